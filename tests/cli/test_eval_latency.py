"""`kdeval latency` on real models in PyTorch and ONNX Runtime: what it prints, leaves behind and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from cli.kdeval import main
from tests.student_train.evaluate.causal_models import make_causal

QUICK = ["--threads", "1", "--runs", "4"]


@pytest.fixture
def student(tiny_teacher_copy: Any) -> Path:
    """One layer, and 64 positions, which start after the padding id."""
    return Path(tiny_teacher_copy("xlm-roberta", num_hidden_layers=1))


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Any) -> Path:
    """So much larger that it is slower in any weather."""
    return Path(tiny_teacher("bert", num_hidden_layers=2, hidden_size=256, intermediate_size=2048))


def test_record(student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.onnx"
    models = ["--student", str(student), "--teacher", str(teacher)]
    assert (
        main(
            ["latency", *models, *QUICK, "--lengths", "64,8", "--batch-sizes", "1,3", "--json", "--onnx-out", str(kept)]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((student / "latency.json").read_text())
    assert (printed["evaluation"], printed["student"], printed["teacher"]) == ("latency", str(student), str(teacher))
    assert {"software", "git_revision", "command", "created", "hardware"} <= printed.keys()
    assert printed["bytes"] == (student / "model.safetensors").stat().st_size
    assert printed["teacher_bytes"] == (teacher / "model.safetensors").stat().st_size
    assert printed["embedding_parameters"] < printed["parameters"] < printed["teacher_parameters"]
    assert 0 < printed["onnx_max_error"] < 1e-4
    assert not printed["notes"]
    keys = ("backend", "device", "dtype", "threads", "batch_size", "seq_len")
    assert [tuple(each[key] for key in keys) for each in printed["measurements"]] == [
        (backend, "cpu", "float32", 1, batch_size, length)
        for backend in ("pytorch", "onnxruntime")
        for batch_size, length in ((1, 8), (3, 8), (1, 64), (3, 64))
    ]
    for each in printed["measurements"]:
        assert 0 < each["median_ms"] <= each["p90_ms"] <= each["p99_ms"]
        assert each["runs"] == 4
        assert each["speedup"] == pytest.approx(each["teacher_median_ms"] / each["median_ms"])
    assert printed["measurements"][3]["speedup"] > 1  # the largest input: more than the cost of a call
    inputs = onnxruntime.InferenceSession(str(kept), providers=["CPUExecutionProvider"]).get_inputs()
    assert [each.name for each in inputs] == ["input_ids", "attention_mask"]


def test_without_teacher_and_onnx(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    threads = torch.get_num_threads()
    assert main(["latency", "--student", str(student), *QUICK]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "speed-up" not in out and "onnxruntime not installed" in out
    record = json.loads((student / "latency.json").read_text())
    assert record["teacher"] is record["teacher_bytes"] is record["onnx_max_error"] is None
    assert {each["backend"] for each in record["measurements"]} == {"pytorch"}
    assert {each["seq_len"] for each in record["measurements"]} == {32, 64}
    assert "lengths end at 64 tokens" in record["notes"][1]
    assert all(each["speedup"] is each["teacher_median_ms"] is None for each in record["measurements"])
    for flags in (["--backends", "pytorch,onnxruntime"], ["--onnx-out", str(student / "model.onnx")]):
        assert main(["latency", "--student", str(student), *QUICK, *flags]) == 1
        assert "pip install 'kdcache[onnx]'" in capsys.readouterr().err


def test_a_family_that_cannot_be_exported(tiny_teacher_copy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    student = str(tiny_teacher_copy("longformer", num_hidden_layers=1, attention_window=8))
    assert main(["latency", "--student", student, *QUICK, "--lengths", "8", "--batch-sizes", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [each["backend"] for each in record["measurements"]] == ["pytorch"]
    assert "'longformer' cannot be exported to ONNX" in record["notes"][0]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lengths 8,65", "reads at most 64 positions"),
        ("--lengths 8,x", "--lengths '8,x'"),
        ("--batch-sizes 0", "--batch-sizes '0'"),
        ("--threads 4096", "this process may use"),
        ("--runs 0", "--runs 0"),
        ("--seconds 0", "--seconds 0.0"),
        ("--backends tensorrt", "--backends 'tensorrt'"),
        ("--backends onnxruntime --device cuda", "measured on the CPU only"),
        ("--backends pytorch --onnx-out x.onnx", "nothing is exported"),
        ("--onnx-out nowhere/x.onnx", "in no existing folder"),
    ],
)
def test_refusals(flags: str, message: str, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", "--student", str(student), *flags.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (student / "latency.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--student", str(student), "--teacher", str(teacher)]
    assert main(["latency", *models, *QUICK, "--lengths", "64", "--device", "cuda", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measurements"]
    assert {(each["backend"], each["device"], each["dtype"]) for each in measured} == {("pytorch", "cuda", "bfloat16")}
    assert all(each["speedup"] > 1 for each in measured)


def test_a_causal_student_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = (make_causal(tmp_path / name, "llama") for name in ("student", "teacher"))
    flags = ["--student", str(student), "--teacher", str(teacher), *QUICK, "--device", "cpu"]
    assert main(["latency", *flags, "--lengths", "8", "--batch-sizes", "1,2", "--new-tokens", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((student / "latency.json").read_text())
    assert [(each["batch_size"], each["new_tokens"]) for each in printed["generation"]] == [(1, 4), (2, 4)]
    assert all(each["speedup"] > 0 and each["runs"] == 4 for each in printed["generation"])
    assert main(["latency", *flags, "--lengths", "8", "--batch-sizes", "1"]) == 0
    assert "Tokens generated by student" in capsys.readouterr().out
    assert main(["latency", *flags, "--backends", "onnxruntime"]) == 1
    assert "timed in PyTorch alone" in capsys.readouterr().err
