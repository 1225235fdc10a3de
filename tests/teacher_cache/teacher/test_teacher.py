"""What cannot teach is refused by name; what can is left unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teacher_cache.errors import TeacherError
from teacher_cache.models.attention import project_hidden
from teacher_cache.teacher.teacher import Teacher


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert", "electra"])
def test_projections_are_found_and_exact(tiny_teacher: Callable[..., Path], family: str) -> None:
    teacher = Teacher.load(str(tiny_teacher(family)))
    found = teacher.probe_attention(3)
    assert found is not None
    ids_BT = torch.arange(10, 40).view(3, 10)
    outputs = teacher.run(ids_BT, torch.full((3,), 10), hidden_layers=[2], attention_layers=[3])
    projected = project_hidden(outputs.hidden[2], found)
    for name in ("query_BTD", "key_BTD", "value_BTD"):
        assert torch.equal(getattr(projected, name), getattr(outputs.attention[3], name))


def test_no_projections_where_rotary_positions_stand_between(tiny_teacher: Callable[..., Path]) -> None:
    assert Teacher.load(str(tiny_teacher("modernbert"))).probe_attention(3) is None


def test_running_changes_no_weight(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    teacher.probe_attention(2)
    teacher.start()
    outputs = teacher.run(torch.arange(10, 30).view(2, 10), torch.tensor([10, 4]), hidden_layers=[4])
    assert torch.equal(outputs.hidden[4], outputs.final_BTD)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rows_are_tried_before_anything_is_built(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    teacher.probe_rows(24)
    with pytest.raises(TeacherError, match="family 'bert' does not run on rows of 65 token ids .*BERT, RoBERTa"):
        teacher.probe_rows(65)
    noise = teacher.model.bert.encoder.layer[1].register_forward_hook(lambda _, __, it: it + torch.rand_like(it))
    with pytest.raises(TeacherError, match="family 'bert' computes other hidden states for the same row each time"):
        teacher.probe_rows(24)
    noise.remove()
    teacher.model.bert.encoder.layer[3].register_forward_hook(lambda _, __, states: states[:, ::2])
    with pytest.raises(TeacherError, match=r"gives hidden state \d of 4 as \(1, 12, 32\) where .* give \(1, 24, 32\)"):
        teacher.probe_rows(24)


def test_the_head_is_tried_before_anything_is_built(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    teacher.probe_head()
    teacher.model.cls = torch.nn.Identity()
    with pytest.raises(TeacherError, match="head of family 'bert' gives"):
        teacher.probe_head()
