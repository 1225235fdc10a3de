"""A process of a sweep that has to end ends with all that it has started; how one ended is told in words."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from cli.sweep_process import failure, run_process, start
from teacher_cache.errors import SettingsError

LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
workers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=new)
           for new in (True, False)]
Path(sys.argv[1]).write_text(" ".join(str(worker.pid) for worker in workers) + "\\n")
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_workers_of_a_launcher_that_must_end_end_too(tmp_path: Path) -> None:
    """As torchrun starts them, in sessions of their own, and as others do."""
    file = tmp_path / "workers"
    command = [sys.executable, "-c", LAUNCHER, str(file)]
    assert run_process(command, [], lambda: file.exists() and file.read_text().endswith("\n")) == -signal.SIGKILL
    workers = [int(pid) for pid in file.read_text().split()]
    deadline = time.monotonic() + 10
    while (running := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not running


def test_what_cannot_be_started_is_named(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text("no program")
    for path, told in ((launcher, "Permission denied"), (tmp_path / "none", "No such file")):
        with pytest.raises(SettingsError, match=f"{str(path)!r} cannot be started .{told}"):
            start([str(path), "-m", "cli.kdtrain"])


@pytest.mark.parametrize("number, told", [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 6, "signal 40")])
def test_every_signal_that_ends_a_process_has_words(number: int, told: str) -> None:
    """Of real-time signals Python names the first and the last alone."""
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    assert failure(run_process([sys.executable, "-c", code], [], lambda: False)) == f"failed ({told})"
