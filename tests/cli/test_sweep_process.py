"""A process of a sweep that has to end ends with all that it has started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from cli.sweep_process import run_process

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
