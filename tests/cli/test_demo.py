"""The demo at toy size, through the real commands, and the text that it is fed by default."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cli.demo import TEACHER_PACKAGE, TEACHER_REQUIREMENT, DemoSettings, main, next_commands
from cli.demo_steps import find_in_package, run_step


def test_demo(tiny_teacher: Any, tiny_corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twice, with the commands that it suggests in between: the store is kept, the student trained anew."""
    out = tmp_path / "demo"
    flags = {"teacher": str(tiny_teacher("bert")), "corpus": str(tiny_corpus), "out": str(out)}
    sizes = {"max_rows": 60, "seq_len": 32, "steps": 3, "batch_size": 8}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in (flags | sizes).items()]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    assert "$ kdcache build --teacher" in printed.err and "$ kdtrain --cache" in printed.err
    assert "relation KL, sum" in printed.out and "better by" in printed.out
    assert (out / "fidelity.png").stat().st_size > 20_000
    compared = json.loads((out / "comparison" / "comparison.json").read_text())
    assert [(row["name"], row["timed_as"]) for row in compared["rows"]] == [("untrained", "student"), ("student", None)]
    assert (out / "comparison" / "quality-latency.png").stat().st_size > 10_000
    student = json.loads((out / "student" / "provenance.json").read_text())
    assert student["command"].startswith("kdtrain --cache")
    assert json.loads((out / "untrained" / "fidelity.json").read_text())["held_out"] is True

    # the commands as printed, without the path that they may have in front
    commands = next_commands(out, DemoSettings(**flags, **sizes))
    for command in commands:
        assert " ".join(command[1:]) in printed.out
        assert run_step(command) == 0, command
    theirs = (out / "student-hs" / "model.safetensors").stat().st_mtime_ns

    store = {path: path.stat().st_mtime_ns for path in (out / "cache.zarr").rglob("*") if path.is_file()}
    (out / "student" / "model.safetensors").write_bytes(b"")
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cache.zarr").rglob("*") if path.is_file()} == store
    assert (out / "student" / "model.safetensors").stat().st_size > 0
    # what was trained beside the demo is not the demo's to delete, and the next suggestion goes elsewhere
    assert (out / "student-hs" / "model.safetensors").stat().st_mtime_ns == theirs
    assert next_commands(out, DemoSettings(**flags, **sizes))[1][-1] == str(out / "student-hs-2")


def test_a_failing_step_ends_the_demo(tiny_teacher: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = str(tiny_teacher("bert"))
    arguments = ["--teacher", teacher, "--corpus", str(tmp_path / "nothing.txt"), "--out", str(tmp_path / "demo")]
    assert main(arguments) == 1
    printed = capfd.readouterr()
    assert "nothing.txt" in printed.err and "kdtrain" not in printed.err and printed.out == ""


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "weights").write_text("precious")
    assert main(["--teacher", "nobody", "--corpus", "nothing", "--out", str(tmp_path)]) == 1
    assert "not written by a demo" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "weights"]


def test_other_inputs_start_another_store(tiny_teacher: Any, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["--teacher", "nobody-has-this-teacher", "--corpus", "nothing", "--out", str(out)]
    assert main(arguments) == 1
    (out / "cache.zarr").mkdir(exist_ok=True)
    assert main(arguments) == 1
    assert (out / "cache.zarr").exists()
    assert main([*arguments, "--seq-len", "64"]) == 1
    assert not (out / "cache.zarr").exists()


def test_the_default_teacher() -> None:
    if find_spec(TEACHER_PACKAGE) is None:
        pytest.skip("the demo's teacher is not installed: `make demo` does that")
    folder = find_in_package(TEACHER_PACKAGE, TEACHER_REQUIREMENT, "model")
    assert (folder / "model.safetensors").exists()
    # found without running the package, which needs what is not installed
    assert TEACHER_PACKAGE not in sys.modules
