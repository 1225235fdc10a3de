"""Which kind of latency is measured: passes of an encoder, answers of a causal model, never one against the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.latency.latency import measure_latency
from student_train.evaluate.latency.settings import LatencySettings
from teacher_cache.errors import SettingsError, StudentError
from tests.student_train.evaluate.causal_models import make_causal

QUICK: dict[str, Any] = {"runs": 1, "threads": "1", "lengths": "8", "batch_sizes": "1", "backends": "pytorch"}


def test_the_kind_of_the_student_decides(tiny_teacher: Any, tmp_path: Path) -> None:
    causal, encoder = str(make_causal(tmp_path / "causal", "llama")), str(tiny_teacher("bert", num_hidden_layers=1))

    def measure(student: str, **flags: Any) -> Any:
        settings = LatencySettings(student=student, **{**QUICK, **flags})
        return measure_latency(settings, devices=("cpu",), show=lambda doing: None)

    answers, passes = measure(causal, new_tokens=3), measure(encoder)
    assert len(answers.generation) == 1 and not answers.measurements
    assert len(passes.measurements) == 1 and not passes.generation and "generation" not in passes.to_json()
    with pytest.raises(SettingsError, match="--new-tokens 3: .* is no causal language model"):
        measure(encoder, new_tokens=3)
    with pytest.raises(StudentError, match="no encoder"):
        measure(encoder, teacher=causal)
    with pytest.raises(SettingsError, match="--new-tokens 1 leaves no token"):
        measure(causal, new_tokens=1)
