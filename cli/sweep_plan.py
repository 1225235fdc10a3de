"""`--dry-run` of a sweep: every run held against its cache, with all its flags."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.sweep_file import PROG, SweepRun
from cli.sweep_summary import completed
from cli.train_flags import SweepFlags
from teacher_cache.errors import DistillationError, SettingsError

if TYPE_CHECKING:
    from teacher_cache.read.pool import CacheSource


def plan_sweep(chosen: Sequence[SweepRun], runs: Sequence[SweepRun], path: Path, flags: SweepFlags) -> int:
    """Say what the chosen ones of all runs are; returns the exit code.

    Raises:
        SettingsError: one of them cannot be.
    """
    there = completed({run.name: run.settings for run in chosen})
    _check_against_caches([run for run in chosen if run.name not in there], path)
    _list(chosen, chosen[0].settings.json)
    return 0


def _check_against_caches(runs: Sequence[SweepRun], path: Path) -> None:
    """Refuse the first run that its cache, or this machine, rules out. Opens each cache once."""
    # imports torch, which a list of wrong flags need not wait for
    from student_train.train.prepare import check_run, open_cache

    readers: dict[tuple[str, ...], CacheSource] = {}
    for run in runs:
        cache = run.settings.cache
        try:
            if cache not in readers:
                readers[cache] = open_cache(run.settings)
            check_run(run.settings, readers[cache])
        except DistillationError as error:
            raise SettingsError(f"{str(path)!r}, run {run.name!r}: {error}") from error


def _list(runs: Sequence[SweepRun], as_json: bool) -> None:
    listed = {run.name: [flag for flag in run.flags if flag not in ("--dry-run", "--json")] for run in runs}
    if as_json:
        print(json.dumps([{"name": run.name, "differs": run.differs, "flags": listed[run.name]} for run in runs]))
        return
    for name, flags in listed.items():
        print(f"{name}: {PROG} {shlex.join(flags)}")
