"""One layer fitted to the teacher's: the same where nothing is left out, and close to it where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel

from student_train.students.narrowing.basis import Basis, StateMoments, make_basis
from student_train.students.narrowing.layer import LayerFit, LayerTrace, trace_layer
from student_train.students.narrowing.parts import ModelParts, find_parts
from student_train.students.narrowing.replay import LayerCall, at_tokens, first_calls, run_layer
from student_train.students.narrowing.sample import TokenSample


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Any) -> ModelParts:
    parts = find_parts(AutoModel.from_pretrained(tiny_teacher("bert"), add_pooling_layer=False).eval())
    assert parts is not None
    return parts


@pytest.fixture(scope="module")
def calls(teacher: ModelParts) -> list[LayerCall]:
    """How the first layer is called on 80 rows of 10 to 16 tokens."""
    real_BT = torch.arange(16) < torch.tensor([10, 16, 12, 16]).repeat(20)[:, None]
    ids_BT = torch.randint(5, 200, real_BT.shape, generator=torch.Generator().manual_seed(0))
    sample = TokenSample(input_ids_BT=ids_BT.masked_fill(~real_BT, 0), real_BT=real_BT)
    with torch.no_grad():
        return first_calls(teacher, [sample])


def student_of(*, width: int = 32, heads: int = 4, units: int = 64) -> ModelParts:
    torch.manual_seed(1)
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": units}
    config = BertConfig(**sizes, num_hidden_layers=1, vocab_size=200, max_position_embeddings=64)
    parts = find_parts(BertModel(config, add_pooling_layer=False).eval())
    assert parts is not None
    return parts


@torch.no_grad()
def fit(teacher: ModelParts, student: ModelParts, calls: list[LayerCall], basis: Basis) -> tuple[Tensor, LayerTrace]:
    """What the fitted layer puts out at the real positions, and what it was fitted to."""
    hidden = [call.hidden_BTD for call in calls]
    trace = trace_layer(teacher.layers[0], basis, calls, hidden)
    mine = [basis.project(hidden_BTD) for hidden_BTD in hidden]
    heads = (student.heads, teacher.heads)
    layer = LayerFit(student.layers[0], teacher.layers[0], basis=basis, heads=heads, calls=calls, hidden=mine)
    return at_tokens(calls, layer.fit(trace)), trace


def whole() -> Basis:
    return Basis(map_DS=torch.eye(32, dtype=torch.float64), kept=1.0)


def leading(teacher: ModelParts, calls: list[LayerCall], width: int) -> Basis:
    places = []
    with torch.no_grad():
        after = [run_layer(teacher.layers[0].module, call, call.hidden_BTD) for call in calls]
    for hidden in ([call.hidden_BTD for call in calls], after):
        moments = StateMoments(32)
        moments.add(at_tokens(calls, hidden))
        places.append(moments)
    return make_basis(places, 32, width)


def error(output: Tensor, trace: LayerTrace) -> float:
    """The part of the variance of the teacher's output, in the student's components, that is missed."""
    targets = trace.output_NS
    return float((output - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def test_the_trace_is_what_the_layer_computes(teacher: ModelParts, calls: list[LayerCall]) -> None:
    hidden, layer = [call.hidden_BTD for call in calls], teacher.layers[0]
    with torch.no_grad():
        trace = trace_layer(layer, whole(), calls, hidden)
        entered = at_tokens(calls, hidden)
        torch.testing.assert_close(trace.query_ND, layer.query(entered))
        torch.testing.assert_close(trace.attention_sum_NS, layer.attention_output(trace.context_ND) + entered)
        torch.testing.assert_close(trace.attended_NS, layer.attention_norm(trace.attention_sum_NS))
        torch.testing.assert_close(trace.inner_NF, layer.inner(trace.attended_NS))
        torch.testing.assert_close(trace.output_sum_NS, layer.outer(trace.active_NF) + trace.attended_NS)
        torch.testing.assert_close(trace.output_NS, layer.output_norm(trace.output_sum_NS))
    assert len(entered) == 20 * (10 + 16 + 12 + 16)


def test_at_the_teachers_sizes_it_is_the_teachers_layer(teacher: ModelParts, calls: list[LayerCall]) -> None:
    student = student_of()
    output, trace = fit(teacher, student, calls, whole())
    torch.testing.assert_close(output, trace.output_NS, rtol=0, atol=1e-4)
    mine, theirs = student.layers[0], teacher.layers[0]
    for name in ("query", "value", "inner", "outer"):
        weight, expected = getattr(mine, name).weight, getattr(theirs, name).weight
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("sizes", [{"heads": 8}, {"units": 96}])
def test_more_heads_or_units_change_nothing(teacher: ModelParts, calls: list[LayerCall], sizes: dict[str, int]) -> None:
    output, trace = fit(teacher, student_of(**sizes), calls, whole())
    # with more heads of fewer components the scores are those of the nearest lower rank
    assert error(output, trace) < (0.2 if "heads" in sizes else 1e-6)


@pytest.mark.parametrize("sizes", [{"heads": 2}, {"units": 24}, {"width": 16}, {"width": 24, "heads": 3, "units": 48}])
def test_smaller_ones_are_close_and_closer_than_chance(
    teacher: ModelParts, calls: list[LayerCall], sizes: dict[str, int]
) -> None:
    basis = leading(teacher, calls, sizes.get("width", 32))
    student = student_of(**sizes)
    with torch.no_grad():
        mine = [basis.project(call.hidden_BTD) for call in calls]
        random = at_tokens(
            calls, [run_layer(student.layers[0].module, *each) for each in zip(calls, mine, strict=True)]
        )
    output, trace = fit(teacher, student, calls, basis)
    assert torch.isfinite(output).all()
    assert error(output, trace) < min(0.5, error(random, trace) / 2)


def test_the_same_rows_give_the_same_weights(teacher: ModelParts, calls: list[LayerCall]) -> None:
    basis = leading(teacher, calls, 16)
    one, other = (fit(teacher, student_of(width=16), calls, basis)[0] for _ in range(2))
    assert torch.equal(one, other)
