"""The flags of `kdeval latency`: lists of numbers, defaults by the machine, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.latency import settings as module
from student_train.evaluate.latency.settings import LatencySettings
from teacher_cache.errors import SettingsError


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that may be any."""
    monkeypatch.setattr(module, "_cores", lambda: 4)


def test_lists_are_sorted_and_name_each_number_once() -> None:
    found = LatencySettings(batch_sizes="32,1,32", lengths="128, 8", threads="4,2")
    assert found.chosen_batch_sizes() == (1, 32)
    assert found.chosen_lengths() == (8, 128)
    assert found.chosen_threads() == (2, 4)


def test_what_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = LatencySettings()
    assert found.chosen_lengths() is None and found.chosen_backends() is None and not found.needs_onnx
    assert found.chosen_threads() == (1, 2)
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert LatencySettings().chosen_threads() == (1,)


def test_backends(tmp_path: Path) -> None:
    both = LatencySettings(backends="onnxruntime, pytorch,onnxruntime")
    assert both.chosen_backends() == ("onnxruntime", "pytorch") and both.needs_onnx
    assert not LatencySettings(backends="pytorch", device="cuda").needs_onnx
    # to keep the export is to ask for it
    assert LatencySettings(onnx_out=str(tmp_path / "model.onnx")).needs_onnx


@pytest.mark.parametrize(
    "options, said",
    [
        ({"runs": 0}, "--runs 0"),
        ({"seconds": 0.0}, "--seconds 0.0"),
        ({"seconds": float("inf")}, "--seconds inf"),
        ({"seconds": float("nan")}, "--seconds nan"),
        ({"batch_sizes": "0,1"}, "--batch-sizes '0,1'"),
        ({"batch_sizes": ""}, "--batch-sizes ''"),
        ({"lengths": "8,x"}, "--lengths '8,x'"),
        ({"threads": "1,5"}, "--threads '1,5': this process may use 4 cores"),
        ({"backends": "tensorrt"}, "--backends 'tensorrt'"),
        ({"backends": "onnxruntime", "device": "cuda"}, "measured on the CPU only"),
        ({"onnx_out": "x.onnx", "backends": "pytorch"}, "--onnx-out 'x.onnx': nothing is exported"),
        ({"onnx_out": "x.onnx", "device": "cuda"}, "--onnx-out 'x.onnx': nothing is exported"),
        ({"onnx_out": "nowhere/x.onnx"}, "in no existing folder"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        LatencySettings(**options)
