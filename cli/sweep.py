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
in `students/mha-3x384-seed0` and so on. Flags that are typed win over the file in every run. The settings of all runs
are made, and so checked, before the first one starts; `--dry-run` also opens their caches and refuses what these cannot
give. Each training is a process of its own; `launcher: torchrun --nproc-per-node 8` puts another command in front.
The same command resumes a sweep: complete runs are left alone, and the one that was stopped goes on. A run that fails
does not stop the others; the exit code is 1 then. The summary lies in `out`: summary.json and summary.md, renewed after
each run.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.display import StatusLine, is_quiet
from cli.entry import is_verbose
from cli.sweep_file import LAUNCHER, PROG, SweepRun, expand
from cli.sweep_summary import as_table, completed, summarise, write_summary
from student_train.out_folder import SWEEP_LOCK, hold_folder
from student_train.train.signals import noted_signals
from teacher_cache.errors import DistillationError, SettingsError

if TYPE_CHECKING:
    from teacher_cache.read.pool import CacheSource

_SIGNALLED = 128
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def run_sweep(path: Path, content: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Train every student of the sweep that is the file's content, and say what came of them; returns the exit code.

    `argv` are the flags that are typed besides.

    Raises:
        SettingsError: the file, or a run in it, cannot be; nothing is trained then.
        TrainingError: another process is at work on this sweep, or its folder cannot be written.
    """
    runs = expand(content, path, argv)
    settings = runs[0].settings
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
    if settings.dry_run:
        states = _completed(runs)
        _check_against_caches([run for run in runs if run.name not in states], path)
        _list(runs, settings.json)
        return 0
    with hold_folder(Path(settings.out).parent, SWEEP_LOCK):
        return _run(runs, _launcher(content))


def _run(runs: Sequence[SweepRun], launcher: Sequence[str]) -> int:
    states = _completed(runs)
    with noted_signals() as received:
        _train_all(runs, states, received, launcher)
    record = _write(runs, states)
    print(json.dumps(record) if runs[0].settings.json else as_table(record["runs"]))
    if received and any(states.get(run.name) != "complete" for run in runs):
        _say("stopped; the same command goes on from here")
        return _SIGNALLED + received[0]
    failed = [name for name, state in states.items() if state != "complete"]
    if failed:
        names = ", ".join(map(repr, failed))
        _say(f"{len(failed)} of {len(runs)} runs failed, see above: {names}; the same command tries them again")
    return int(bool(failed))


def _completed(runs: Sequence[SweepRun]) -> dict[str, str]:
    return dict.fromkeys(completed({run.name: run.settings for run in runs}), "complete")


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


def _train_all(
    runs: Sequence[SweepRun], states: dict[str, str], received: list[signal.Signals], launcher: Sequence[str]
) -> None:
    for number, run in enumerate(runs, start=1):
        if received:
            return
        StatusLine().note(f"[{number}/{len(runs)}] {run.name}: {states.get(run.name, 'training')}")
        if run.name not in states:
            code = _train(run, received, launcher)
            if code == 0:
                states[run.name] = "complete"
            else:
                states[run.name] = "stopped" if received else _failure(code)
            _write(runs, states)


def _write(runs: Sequence[SweepRun], states: Mapping[str, str]) -> dict[str, Any]:
    summaries = [summarise(run.name, run.differs, run.settings, states.get(run.name, "not started")) for run in runs]
    return write_summary(summaries, Path(runs[0].settings.out).parent)


def _failure(code: int) -> str:
    return f"failed ({code})" if code > 0 else f"failed ({signal.Signals(-code).name})"


def _launcher(content: Mapping[str, Any]) -> list[str]:
    launcher = content.get(LAUNCHER)
    if launcher:
        return shlex.split(str(launcher))
    # `-m` looks in the current folder first, where a package called cli may be the user's own
    return [sys.executable] if Path.cwd() == Path(__file__).resolve().parents[1] else [sys.executable, "-P"]


def _train(run: SweepRun, received: list[signal.Signals], launcher: Sequence[str]) -> int:
    """One training in a process of its own, with the first signal of ours handed on once; its exit code."""
    resume = ["--resume", "auto"] if run.settings.resume == "never" else []
    loudness = ["-v"] if is_verbose() else ["-q"] if is_quiet() else []
    process = start([*launcher, "-m", "cli.kdtrain", *run.flags, *resume, *loudness])
    handed_on = False
    try:
        while True:
            try:
                return process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if received and not handed_on:
                    process.send_signal(received[0])
                    handed_on = True
    finally:
        if process.poll() is None:  # a second Ctrl-C: it ends at once, as it would by itself
            process.send_signal(signal.SIGINT)
            process.wait()


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that a terminal's Ctrl-C does not reach and that does not outlive this one; what it prints is dropped.

    Were it reached by what we hand on as well, the second signal would end it unsaved; and one that went on after we
    are killed would write into the same folder as the sweep that resumes.
    """
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=end_with_parent,
    )


def _say(text: str) -> None:
    print(f"{PROG}: {text}", file=sys.stderr, flush=True)


def _list(runs: Sequence[SweepRun], as_json: bool) -> None:
    listed = {run.name: [flag for flag in run.flags if flag not in ("--dry-run", "--json")] for run in runs}
    if as_json:
        print(json.dumps([{"name": run.name, "differs": run.differs, "flags": listed[run.name]} for run in runs]))
        return
    for name, flags in listed.items():
        print(f"{name}: {PROG} {shlex.join(flags)}")
