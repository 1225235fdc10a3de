"""`--only`: which runs of a sweep a process takes part in, by name or by number."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from cli.sweep_file import SweepRun
from teacher_cache.errors import SettingsError
from teacher_cache.fields import shorten
from teacher_cache.wording import some


def choose_runs(runs: Sequence[SweepRun], only: Sequence[str], path: Path) -> list[SweepRun]:
    """The runs that `only` names, in their order; all where it names none. A name that is a number counts as a name.

    Raises:
        SettingsError: there is no such run.
    """
    chosen = {_find(runs, wanted, path) for wanted in only}
    return [run for place, run in enumerate(runs) if not only or place in chosen]


def _find(runs: Sequence[SweepRun], wanted: str, path: Path) -> int:
    names = [run.name for run in runs]
    if wanted in names:
        return names.index(wanted)
    if wanted.isascii() and wanted.isdecimal():
        if len(wanted) < 8 and 1 <= int(wanted) <= len(runs):
            return int(wanted) - 1
        raise SettingsError(
            f"--only {shorten(wanted)} is the number of no run: {str(path)!r} has {len(runs)}, counted from 1, so an "
            f"array of jobs for all of them is --array=1-{len(runs)}"
        )
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {some(list(map(repr, names)))}"
    raise SettingsError(f"--only {shorten(wanted)} names no run of {str(path)!r}: {hint}")
