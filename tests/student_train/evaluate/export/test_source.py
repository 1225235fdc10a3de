"""What kind of model a student is, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultipleChoice

from student_train.evaluate.export.source import read_source
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.causal_models import make_causal


def test_kinds(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    filled = read_source(str(tiny_teacher("electra", num_hidden_layers=1)))
    assert (filled.kind.pipeline, filled.kind.output, filled.fine_tuned, filled.causal) == (
        "fill-mask", "logits", False, False,
    )  # fmt: skip
    bare = read_source(str(tiny_teacher("bert", head=False, num_hidden_layers=1)))
    assert (bare.kind.pipeline, bare.kind.output, bare.positions) == ("feature-extraction", "last_hidden_state", 64)
    written = read_source(str(make_causal(tmp_path / "it", "gpt2")))
    assert (written.kind.pipeline, written.causal) == ("text-generation", True)


def test_weights_that_are_missing(tiny_teacher_copy: Callable[..., Path]) -> None:
    student = tiny_teacher_copy("bert", num_hidden_layers=1)
    weights = load_file(student / "model.safetensors")
    lost = next(name for name in weights if name.startswith("cls.predictions.transform"))
    save_file({name: value for name, value in weights.items() if name != lost}, student / "model.safetensors")
    with pytest.raises(StudentError, match=rf"lacks 1 weights that its config\.json promises, '{lost}'"):
        read_source(str(student))


def test_heads_without_a_pipeline_here(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForMultipleChoice.from_pretrained(tiny_teacher("bert", num_hidden_layers=1))
    model.save_pretrained(tmp_path / "it")
    with pytest.raises(StudentError, match="is a BertForMultipleChoice"):
        read_source(str(tmp_path / "it"))
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    (tmp_path / "it" / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(StudentError):
        read_source(str(tmp_path / "it"))
