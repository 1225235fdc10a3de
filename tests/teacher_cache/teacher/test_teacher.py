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


def test_the_head_is_tried_before_anything_is_built(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    teacher.probe_head()
    teacher.model.cls = torch.nn.Identity()
    with pytest.raises(TeacherError, match="head of family 'bert' gives"):
        teacher.probe_head()
