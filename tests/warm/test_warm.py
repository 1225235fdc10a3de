"""A fork of the warm process is what `python` would be for whoever starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.warm.share import Warm, shared_server


@pytest.mark.parametrize(
    "program, code, printed, told",
    [
        ("print(sys.argv[1:], os.environ['OWN'], os.getcwd(), sys.stdin.read())", 0, "['-a', 'b'] own / given\n", ""),
        ("import torch; print(torch.get_num_threads()); sys.exit(3)", 3, "3\n", ""),
        ("sys.exit('told')", 1, "", "told\n"),
        ("print(__name__, 'cli.kdtrain' in sys.modules); 1 / 0", 1, "__main__ False\n", "ZeroDivisionError"),
        ("os.kill(os.getpid(), 9)", -9, "", ""),
        ("os.kill(os.getpid(), 15)", -15, "", ""),
        ("import atexit; atexit.register(print, 'left')", 0, "left\n", ""),
    ],
)
def test_it_ends_like_a_process_of_its_own(warm: Warm, program: str, code: int, printed: str, told: str) -> None:
    done = subprocess.run(
        [*warm.python, "-c", f"import os, sys; {program}", "-a", "b"],
        env={**os.environ, "OWN": "own", "OMP_NUM_THREADS": "3"},
        cwd="/",
        input="given",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, printed) and told in done.stderr


def test_modules_and_files_run(warm: Warm, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text("import beside, sys; print(beside.NAME, sys.argv[1])")
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    assert subprocess.check_output([*warm.python, str(file), "one"], text=True) == "beside one\n"
    assert subprocess.check_output([*warm.python, "-m", "cli.kdtrain", "--version"], text=True).startswith("kdtrain ")


WAITING = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
file = Path(sys.argv[1])
file.with_suffix(".tmp").write_text(str(os.getpid()))
file.with_suffix(".tmp").rename(file)
while True:
    time.sleep(0.01)
"""


def waiting(file: Path) -> int:
    while not file.exists():
        time.sleep(0.01)
    return int(file.read_text())


def test_signals_are_handed_on(warm: Warm, tmp_path: Path) -> None:
    with subprocess.Popen([*warm.python, "-c", WAITING, tmp_path / "pid"]) as process:
        assert waiting(tmp_path / "pid") != process.pid
        process.terminate()
        assert process.wait() == 7


def test_a_fork_does_not_outlive_who_asked_for_it(warm: Warm, tmp_path: Path) -> None:
    with subprocess.Popen([*warm.python, "-c", WAITING, tmp_path / "pid"]) as process:
        fork = waiting(tmp_path / "pid")
        process.kill()
    while Path(f"/proc/{fork}").exists():
        time.sleep(0.01)


def test_one_without_a_process_in_between(warm: Warm, tmp_path: Path) -> None:
    forked = warm.start(["-c", WAITING, str(tmp_path / "pid")])
    assert waiting(tmp_path / "pid") == forked.pid and forked.poll() is None
    forked.send_signal(signal.SIGTERM)
    assert forked.wait() == forked.poll() == 7
    forked.kill()


def test_whoever_comes_later_holds_the_same_server(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "warm.txt").write_text(warm.address)
    with shared_server(tmp_path, alone=False) as other:
        assert other == warm
    assert subprocess.run([*warm.python, "-c", ""]).returncode == 0, "it is held by others still"
