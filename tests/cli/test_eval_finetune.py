"""`kdeval finetune`: what it prints, what it leaves behind, how it goes on after an interruption, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.kdeval import main


@pytest.fixture
def arguments(tiny_teacher_copy: Any, tmp_path: Path) -> list[str]:
    """A tiny BERT and 64 sentences to train on, 16 to measure on."""
    for name, count in (("train", 64), ("dev", 16)):
        lines = [f"{('babo', 'dabo')[number % 2]} bada\t{number % 2}" for number in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    files = ["--train-file", str(tmp_path / "train.tsv"), "--dev-file", str(tmp_path / "dev.tsv")]
    student = str(tiny_teacher_copy("bert", initializer_range=0.02))
    return ["finetune", "--student", student, "--task", "sst2", *files, "--epochs", "0.5", "--max-length", "16"]


def test_record_and_table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    student = Path(arguments[2])
    before = {file.name for file in student.iterdir()}
    assert main([*arguments, "--seeds", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((student / "finetune-sst2.json").read_text())
    assert {"software", "git_revision", "command", "created"} <= printed.keys()
    assert (printed["evaluation"], printed["task"], printed["metric"]) == ("finetune", "sst2", "accuracy")
    assert printed["student"] == str(student) and len(printed["fingerprint"]) == 64
    assert printed["seeds"] == [0, 1] and printed["learning_rates"] == [5e-5, 5e-5]
    assert printed["scores"] == [each["dev"]["accuracy"] for each in printed["all_metrics"]]
    assert printed["mean"] == pytest.approx(sum(printed["scores"]) / 2) and printed["sd"] is not None
    assert printed["examples"] == {"train": 64, "dev": 16}
    assert "by_test" not in printed
    # the record and the results are all that is left: no checkpoints
    assert {file.name for file in student.iterdir()} - before == {"finetune-sst2.json", ".finetune-cache"}
    assert main([*arguments, "--seeds", "1"]) == 0
    table = capsys.readouterr().out
    assert "sst2 of teacher: accuracy" in table and f"{100 * printed['scores'][0]:.2f}" in table and "±" not in table
    assert json.loads((student / "finetune-sst2.json").read_text())["sd"] is None


def test_standard_output_holds_the_record_alone(arguments: list[str]) -> None:
    """Trainer, Accelerate and DeepSpeed all print; in a process of its own, so that none of them has done so before."""
    command = [sys.executable, "-m", "cli.kdeval", *arguments, "--seeds", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["seeds"] == [0]
    ours = ("fine-tuning sst2, seed 0", "loading PyTorch")
    assert [line for line in result.stderr.splitlines() if not line.startswith(ours)] == []


def test_a_student_that_cannot_be_written_to(
    arguments: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    student = Path(arguments[2])
    (student / ".finetune-cache").write_text("")  # permissions would not stop the superuser
    (student / "finetune-sst2.json").mkdir()
    assert main([*arguments, "--seeds", "1", "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["seeds"] == [0]
    assert "the record was not written" in output.err and "compare" in output.err
    assert "results are not kept" in caplog.text and "--cache-dir" in caplog.text
    (student / "finetune-sst2.json").rmdir()
    assert main([*arguments, "--seeds", "1", "--cache-dir", str(student.parent / "kept")]) == 0
    assert len(list((student.parent / "kept").iterdir())) == 1


def test_refusals(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*others: str) -> str:
        assert main([*arguments, *others]) == 1
        output = capsys.readouterr()
        assert output.out == "" and "Traceback" not in output.err
        return output.err

    bad = tmp_path / "bad.tsv"
    bad.write_text("sentence\tlabel\nbabo\t1\ndabo\t7\n")
    assert f"{str(bad)!r}, line 3: label '7'" in refused("--train-file", str(bad))
    assert "there is no file" in refused("--dev-file", str(tmp_path / "nowhere.tsv"))
    assert "needs a GPU" in refused("--precision", "bfloat16", "--device", "cpu")
    student = arguments[1:3]
    assert main(["finetune", *student, "--task", "xnli"]) == 1
    assert "--train-file and --dev-file" in capsys.readouterr().err
    assert not (Path(arguments[2]) / "finetune-sst2.json").exists()
    assert main(["finetune", *student, "--task", "squad"]) == 1
    assert "--task 'squad' is none that is known here" in capsys.readouterr().err


def test_a_missing_library_is_named(arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from student_train.evaluate.finetune import metrics as task_metrics

    monkeypatch.setitem(task_metrics.NEEDED, "a_library_that_is_not_there", "its-package")
    assert main(arguments) == 1
    assert "needs its-package, which is not installed: pip install 'kdcache[eval]'" in capsys.readouterr().err
