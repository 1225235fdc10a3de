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
    evaluate:
      fidelity: {}

Flags at the top are common to all runs; each of `runs` is taken with every combination of `grid`, here eight students
in `students/mha-3x384-seed0` and so on. Flags that are typed win over the file in every run. The settings of all runs
are made, and so checked, before the first one starts; `--dry-run` also opens their caches, refuses what these cannot
give, and measures what each run would take. Each training is a process of its own; `launcher: torchrun
--nproc-per-node 8` puts another command in front. Each student is measured as `evaluate:` says once it is trained.

The same command resumes a sweep: complete runs are left alone, and the one that was stopped goes on. Started on several
machines that share the folder, it shares the runs out among them: see `sweep_work.py` and `sweep_claims.py`. A run that
fails does not stop the others; the exit code is 1 then. The summary lies in `out`: summary.json and summary.md, renewed
after each run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.options import NOTHING, parse
from cli.sweep_choice import choose_runs
from cli.sweep_claims import Claims
from cli.sweep_evaluations import Evaluation, read_evaluations, to_measure
from cli.sweep_file import EVALUATE, LAUNCHER, PROG, SweepRun, expand
from cli.sweep_process import python
from cli.sweep_summary import as_table, completed, summarise, write_summary
from cli.sweep_work import COMPLETE, SweepWork
from cli.train_flags import SweepFlags, refuse_without_dry_run, split_sweep_flags
from student_train.run_files import PROVENANCE
from student_train.train.signals import noted_signals
from teacher_cache.errors import SettingsError

_SIGNALLED = 128


def run_sweep(path: Path, content: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Train every student of the sweep that is the file's content, and say what came of them; returns the exit code.

    `argv` are the flags that are typed besides.

    Raises:
        SettingsError: the file, or a run in it, cannot be; nothing is trained then.
        TrainingError: its folder cannot be written.
    """
    of_sweep, argv = split_sweep_flags(argv)
    flags = parse(SweepFlags, of_sweep, PROG)
    runs = expand(content, path, argv)
    settings = runs[0].settings
    evaluations = read_evaluations(content.get(EVALUATE, ""), path, settings)
    chosen = choose_runs(runs, flags.only, path)
    if settings.resume not in ("never", "auto"):
        raise SettingsError(
            f"--resume {settings.resume!r} names one checkpoint, and {str(path)!r} is a sweep of {len(runs)}: each "
            "goes on from its own newest; leave the flag out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            f"--config {str(path)!r} is a sweep, which starts its trainings itself, and this is one process of several "
            f"that would all start them; run kdtrain by itself and put your launcher into the file, as {LAUNCHER}: "
            "torchrun --nproc-per-node 8"
        )
    refuse_without_dry_run(flags, dry_run=settings.dry_run)
    if settings.dry_run:
        from cli.sweep_plan import plan_sweep

        return plan_sweep(chosen, path, flags, launched=bool(content.get(LAUNCHER)))
    return _run(chosen, runs, evaluations, flags, _launcher(content, path))


def _run(
    chosen: Sequence[SweepRun],
    runs: Sequence[SweepRun],
    evaluations: Sequence[Evaluation],
    flags: SweepFlags,
    launcher: Sequence[str],
) -> int:
    """Take part in the chosen ones of all runs."""
    claims = Claims(Path(runs[0].settings.out).parent)
    completed({run.name: run.settings for run in runs})  # refuses students of other settings

    def write(states: Mapping[str, str]) -> dict[str, Any]:
        return _write(runs, {run.name: states.get(run.name) or _elsewhere(run, evaluations, claims) for run in runs})

    with noted_signals() as received:
        work = SweepWork(
            chosen, runs, evaluations, launcher=launcher, claims=claims, received=received, tell=write
        )  # fmt: skip
        work.work(wait=flags.wait)
    record = write(work.states)
    print(json.dumps(record) if runs[0].settings.json else as_table(record["runs"]))
    states = work.states
    if received and any(states.get(run.name) != COMPLETE for run in chosen):
        _say("stopped; the same command goes on from here")
        return _SIGNALLED + received[0]
    failed = [run.name for run in chosen if states.get(run.name, COMPLETE) != COMPLETE]
    if failed:
        names = ", ".join(map(repr, failed))
        _say(f"{len(failed)} of {len(chosen)} runs failed, see above: {names}; the same command tries them again")
    left = [run.name for run in chosen if run.name not in states]
    if left:
        _say(f"{len(left)} of {len(chosen)} runs are left to other processes: {', '.join(map(repr, left))}")
    return int(bool(failed))


def _elsewhere(run: SweepRun, evaluations: Sequence[Evaluation], claims: Claims) -> str:
    """What is to be said of a run that has not come to an end in this process."""
    seen = claims.look(run.name)
    if seen is not None and seen.outcome is None:
        return f"training in {seen.holder}"
    outcome = None if seen is None else seen.outcome
    # a released claim is what somebody said once: the folder may have been deleted or trained anew since
    if not (Path(run.settings.out) / PROVENANCE).exists():
        return "not started" if outcome in (None, COMPLETE) else str(outcome)
    return outcome if outcome is not None and to_measure(evaluations, run.settings) else COMPLETE


def _write(runs: Sequence[SweepRun], states: Mapping[str, str]) -> dict[str, Any]:
    summaries = [summarise(run.name, run.differs, run.settings, states[run.name]) for run in runs]
    return write_summary(summaries, Path(runs[0].settings.out).parent)


def _launcher(content: Mapping[str, Any], path: Path) -> list[str]:
    launcher = str(content.get(LAUNCHER, ""))
    command = [] if launcher in NOTHING else shlex.split(launcher)
    if command and shutil.which(command[0]) is None:
        raise SettingsError(
            f"{str(path)!r}: {LAUNCHER} {launcher!r} starts with {command[0]!r}, which is no program on this machine, "
            "so no training could start; name one that is in PATH, or leave it out to train in one process"
        )
    return command or python()


def _say(text: str) -> None:
    print(f"{PROG}: {text}", file=sys.stderr, flush=True)
