"""Two processes with the same --out: one of them trains, the other is told who does."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.kdtrain import main
from cli.sweep_claims import FOLDER
from student_train.out_folder import RUN_LOCK
from student_train.run_files import read_records
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from tests.warm.client import Forked
from tests.warm.share import Warm

STEPS = 3


@pytest.fixture(scope="module")
def store(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("locked") / "cache.zarr"
    settings = {"teacher": str(tiny_teacher("bert")), "corpus": (str(tiny_corpus),), "out": str(out), "device": "cpu"}
    build_cache(BuildSettings(**settings, seq_len=24, max_rows=64, block_rows=8, layers="2,4"))
    return out


def flags(store: Path, out: Path) -> list[str]:
    return [
        "--cache",
        str(store),
        "--out",
        str(out),
        "--method=mha",
        f"--steps={STEPS}",
        "--device=cpu",
        "--student=2x32",
    ]


def halted(pid: int) -> bool:
    """Whether no thread of a process runs."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


@contextmanager
def stopped_once(warm: Warm, there: Path, arguments: list[str]) -> Iterator[Forked]:
    """A kdtrain in a process of its own, halted when a file has something in it and killed at the end."""
    process = warm.start(["-m", "cli.kdtrain", *arguments])
    try:
        while not there.exists() or not there.stat().st_size:
            assert process.poll() is None, "it ended before it could be met half-way"
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        # a thread writes on until it has seen the signal
        while not halted(process.pid):
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_training_into_one_folder_is_refused_until_the_first_one_has_ended(
    store: Path, warm: Warm, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "new" / "student"
    again = [*flags(store, out), "--resume=auto"]
    with stopped_once(warm, out / "metrics.jsonl", flags(store, out)) as first:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for _ in range(2):
            assert main(again) == 1
            told = capsys.readouterr().err
            holder = rf"pid {first.pid} on {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\dT"
            assert re.search(rf"'{out}' is being written by another process \({holder}.*another --out", told)
        assert main([*again, "--dry-run"]) == 0
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert [record["step"] for record in read_records(out / "metrics.jsonl") if "loss" in record] == [1, 2, 3]
    assert not (out / RUN_LOCK).exists()


def test_a_killed_training_holds_nobody_up(store: Path, warm: Warm, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with stopped_once(warm, out / RUN_LOCK, flags(store, out)):
        pass
    assert [path.name for path in out.iterdir()] == [RUN_LOCK]
    assert main(flags(store, out)) == 0
    assert (out / "model.safetensors").exists() and not (out / RUN_LOCK).exists()


def test_a_refused_training_leaves_no_folder_behind(store: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([*flags(store, tmp_path / "new" / "student"), "--mapping=1:9", "--method=hs"]) == 1
    assert "layer 9" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_second_sweep_leaves_the_first_ones_run_alone_and_others_may_train_beside_them(
    store: Path, warm: Warm, tmp_path: Path, capsys: Any
) -> None:
    out, path = tmp_path / "students", tmp_path / "sweep.yaml"
    path.write_text(
        f"cache: {store}\nout: {out}\nstudent: 2x32\nmethod: mha\nsteps: {STEPS}\ndevice: cpu\n"
        f"launcher: {shlex.join(warm.python)}\nruns: {{a: {{}}}}\n"
    )
    with stopped_once(warm, out / FOLDER / "a.1", ["--config", str(path)]) as first:
        assert main(["--config", str(path), "--no-wait"]) == 0
        told = capsys.readouterr()
        assert f"a: training in process {first.pid} on" in told.err and "1 of 1 runs are left to other" in told.err
        assert f"training in process {first.pid} on" in told.out
        assert main(["--config", str(path), "--dry-run"]) == 0
        # a student beside those of the sweep is nobody's business
        assert main(flags(store, out / "alone")) == 0
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert (out / "a" / "model.safetensors").exists() and not (out / "a" / RUN_LOCK).exists()
    assert [path.name for path in (out / FOLDER).iterdir()] == ["a.1"]
