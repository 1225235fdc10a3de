"""Many students from one cache: `kdtrain --config sweep.yaml`, where the file has `runs:` or `grid:` or both.

    cache: cache.zarr
    out: students
    steps: 2000
    runs:
      mha: {method: mha}
      hs: {method: hs, mapping: uniform+last}
    grid:
      student: [3x384, 6x384]
      seed: [0, 1]

Flags at the top are common to all runs; each of `runs` is taken with every combination of `grid`, here eight students
in `students/mha-3x384-seed0` and so on. Flags that are typed win over the file in every run. All runs are checked
before the first one starts. Each is a process of its own; `launcher: torchrun --nproc-per-node 8` puts another command
in front. A run that is complete is not made again and one that was stopped goes on, so that the same command resumes a
sweep. One that fails does not stop the others; then the exit code is 1. The summary lies in `out`: summary.json and
summary.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli.options import flags_of, parse, read_config
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError

if TYPE_CHECKING:
    from student_train.sweep_summary import RunSummary

PROG = "kdtrain"
SWEEP_KEYS = frozenset({"runs", "grid"})
LAUNCHER = "launcher"
_SIGNALLED = 128
_FILE_WIDTH = 240


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One training of a sweep: `differs` is what it does not share with all others, `flags` all of its flags."""

    name: str
    differs: Mapping[str, str]
    flags: tuple[str, ...]
    settings: TrainSettings


def run_sweep(path: Path, argv: Sequence[str]) -> int:
    """Train every student of the sweep in the file, and say what came of them; returns the exit code.

    Raises:
        SettingsError: the file, or a run in it, cannot be; nothing is trained then.
    """
    content = read_config(path)
    runs = expand(content, path, _without_config(argv))
    settings = runs[0].settings
    if settings.dry_run:
        _list(runs, settings.json)
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            f"--config {str(path)!r} is a sweep, which starts its trainings itself, and this is one process of several: "
            f"each would start them all; run kdtrain by itself and put your launcher into the file, as {LAUNCHER}: "
            "torchrun --nproc-per-node 8"
        )
    from student_train.sweep_summary import is_complete, summarise, write_summary

    complete = {run.name for run in runs if is_complete(run.name, run.settings)}
    states: dict[str, str] = dict.fromkeys(complete, "complete")
    stopped_by = 0
    for number, run in enumerate(runs, start=1):
        state = states.get(run.name, "training")
        print(f"[{number}/{len(runs)}] {run.name}: {state}", file=sys.stderr, flush=True)
        if run.name not in states:
            code = _train(run, _launcher(content))
            stopped = "stopped" if code > _SIGNALLED else f"failed ({code})"
            states[run.name] = stopped if code else "complete"
            if code in (_SIGNALLED + signal.SIGINT, _SIGNALLED + signal.SIGTERM):
                stopped_by = code
                break
    summaries = [summarise(run.name, run.differs, run.settings, states.get(run.name, "not started")) for run in runs]
    write_summary(summaries, Path(runs[0].settings.out).parent)
    _print(summaries, settings.json)
    return stopped_by or int(any(state.startswith("failed") for state in states.values()))


def expand(content: Mapping[str, Any], path: Path, argv: Sequence[str]) -> list[SweepRun]:
    """The runs of a sweep, each with settings that go together.

    Raises:
        SettingsError: `runs` or `grid` is no mapping, two runs have one name, or the settings of one cannot be.
    """
    own = {str(key).replace("-", "_"): value for key, value in content.items() if key not in (*SWEEP_KEYS, LAUNCHER)}
    out = Path(str(own.pop("out", "students")))
    common = flags_of(own, TrainSettings, path, PROG)
    runs: list[SweepRun] = []
    for name, differs in _combinations(content, path):
        if name in {run.name for run in runs}:
            raise SettingsError(
                f"{str(path)!r}: two runs are called {name!r}: one would overwrite the other; rename one"
            )
        flags = [*common, *flags_of(differs, TrainSettings, path, f"{PROG}, run {name!r}"), *argv]
        try:
            settings = parse(TrainSettings, flags, PROG)
            # typed, it is the folder of them all
            folder = Path(settings.out) if any(word.split("=")[0] == "--out" for word in argv) else out
            settings = replace(settings, out=str(folder / name))
        except SettingsError as error:
            raise SettingsError(f"{str(path)!r}, run {name!r}: {error}") from error
        shown = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in differs.items()}
        runs.append(SweepRun(name=name, differs=shown, flags=(*flags, "--out", settings.out), settings=settings))
    return runs


def _combinations(content: Mapping[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each run's name and what it does not share with the others."""
    named, grid = content.get("runs") or {"": {}}, content.get("grid") or {}
    for key, value in (("runs", named), ("grid", grid)):
        if not isinstance(value, Mapping):
            raise SettingsError(
                f"{str(path)!r}: {key!r} is {value!r}, where a mapping is expected: runs maps names to flags, such as "
                "`mha: {method: mha}`, and grid maps flags to lists of values, such as `seed: [0, 1]`"
            )
    for name, flags in named.items():
        if not isinstance(flags, Mapping | str) or (isinstance(flags, str) and flags):
            raise SettingsError(
                f"{str(path)!r}: run {name!r} is {flags!r}, where flags are expected: `{{method: mha}}`"
            )
    for flag, values in grid.items():
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise SettingsError(
                f"{str(path)!r}: grid {flag!r} is {values!r}, where a list of values is expected: [0, 1]"
            )
    found = []
    for name, flags in named.items():
        for values in product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            parts = [name, *(_name_part(flag, value) for flag, value in chosen.items())]
            found.append(("-".join(part for part in parts if part), {**(flags or {}), **chosen}))
    return found


def _name_part(flag: str, value: str) -> str:
    """`3x384` for a value that speaks for itself, `seed0` for a number; only characters that folders may have."""
    text = f"{flag}{value}" if re.fullmatch(r"[-+.\deE]+", value) else value
    return re.sub(r"[^\w.+=-]+", "_", text)


def _without_config(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in argv:
        if not skip and not argument.startswith("--config="):
            if argument == "--config":
                skip = True
                continue
            kept.append(argument)
        skip = False
    return kept


def _launcher(content: Mapping[str, Any]) -> list[str]:
    launcher = content.get(LAUNCHER)
    return [sys.executable] if not launcher else shlex.split(str(launcher))


def _train(run: SweepRun, launcher: Sequence[str]) -> int:
    """One training in a process of its own, with our signals handed on; its exit code."""
    flags = [*run.flags, "--resume", "auto"] if run.settings.resume == "never" else run.flags
    process = subprocess.Popen([*launcher, "-m", "cli.kdtrain", *flags], stdout=subprocess.DEVNULL)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def hand_on(number: int, _frame: FrameType | None) -> None:
        # a terminal sends Ctrl-C to both; a second one of these would end it unsaved
        if number == signal.SIGTERM:
            process.send_signal(number)

    for number in before:
        signal.signal(number, hand_on)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else _SIGNALLED - code


def _list(runs: Sequence[SweepRun], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": run.name, "differs": run.differs, "flags": run.flags} for run in runs]))
        return
    for run in runs:
        print(f"{run.name}: {PROG} {shlex.join(flag for flag in run.flags if flag != '--dry-run')}")


def _print(summaries: Sequence[RunSummary], as_json: bool) -> None:
    from rich.console import Console

    from student_train.sweep_summary import as_table

    if as_json:
        print(json.dumps([summary.to_json() for summary in summaries]))
    else:
        # where nobody's screen limits it, no cell is broken
        Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(as_table(summaries))
