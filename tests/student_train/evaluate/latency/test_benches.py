"""The ways to run an encoder: each does one forward pass on the same inputs, on the device and threads it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student_train.evaluate.latency import benches
from student_train.evaluate.latency.benches import list_benches
from student_train.evaluate.latency.models import TimedModel, load_timed
from student_train.evaluate.latency.schedule import Size
from student_train.evaluate.latency.settings import LatencySettings

SIZE = Size.of(3, 10)


@pytest.fixture
def models(tiny_teacher: Any) -> list[TimedModel]:
    """A student, and a teacher that is twice as deep."""
    depths = {"student": 1, "teacher": 2}
    return [load_timed(str(tiny_teacher("bert", num_hidden_layers=depth)), role) for role, depth in depths.items()]


@pytest.fixture
def threads_restored() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_bench_for_each_backend_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_train.evaluate.latency.settings._cores", lambda: 4)
    settings, files = LatencySettings(threads="1,4"), [Path("student.onnx")]

    def threads(device: str, files: list[Path], *backends: str) -> list[int]:
        return [plan.threads for plan in list_benches(device, [], files, backends, settings)]

    assert threads("cpu", [], "pytorch") == [1, 4]
    assert threads("cpu", files, "pytorch", "onnxruntime") == [1, 4, 1, 4]
    assert threads("cpu", files, "onnxruntime") == [1, 4]
    # a GPU has one thread of the host, and ONNX Runtime is for the CPU
    assert threads("cuda", files, "pytorch", "onnxruntime") == [1]
    assert threads("cpu", [], "onnxruntime") == [], "nothing was exported"


@pytest.mark.parametrize("asked, dtype", [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_pytorch(models: list[TimedModel], threads_restored: None, asked: Any, dtype: str) -> None:
    settings = LatencySettings(threads="1", dtype=asked)
    (plan,) = list_benches("cpu", models, [], ["pytorch"], settings)
    bench = plan.set_up()
    assert (bench.backend, bench.device, bench.dtype, bench.threads) == ("pytorch", "cpu", dtype, 1)
    assert torch.get_num_threads() == 1
    seen: list[tuple[int, Tensor]] = []
    for place, model in enumerate(models):
        assert {parameter.dtype for parameter in model.encoder.parameters()} == {getattr(torch, dtype)}
        model.encoder.get_input_embeddings().register_forward_hook(
            lambda _, inputs, __, place=place: seen.append((place, inputs[0]))
        )
    student, teacher = bench.passes(SIZE)
    assert seen == [], "inputs are made before anything is timed, and nothing is run"
    student()
    teacher()
    student()
    assert [place for place, _ in seen] == [0, 1, 0]
    assert all(torch.equal(ids, models[0].random_ids(3, 10)) for _, ids in seen)


def test_onnx_runtime(models: list[TimedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which file is opened with how many threads, and what it is fed; that it computes right is its own test."""
    opened: list[tuple[Path, int]] = []
    fed: list[tuple[Path, dict[str, Any]]] = []

    def open_session(file: Path, threads: int) -> Path:
        opened.append((file, threads))
        return file

    monkeypatch.setattr(benches, "open_session", open_session)
    monkeypatch.setattr(benches, "run_session", lambda session, feed: fed.append((session, feed)))
    files = [Path("student.onnx"), Path("teacher.onnx")]
    (plan,) = list_benches("cpu", models, files, ["onnxruntime"], LatencySettings(threads="1"))
    assert opened == []
    bench = plan.set_up()
    assert (bench.backend, bench.device, bench.dtype, bench.threads) == ("onnxruntime", "cpu", "float32", 1)
    assert opened == [(file, 1) for file in files]
    for call in bench.passes(SIZE):
        call()
    assert [session for session, _ in fed] == files
    for _, feed in fed:
        assert np.array_equal(feed["input_ids"], models[0].random_ids(3, 10).numpy())
        assert feed["attention_mask"].shape == (3, 10) and feed["attention_mask"].all()
