"""Layers run one at a time give what the whole model gives, padding and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from student_train.students.narrowing.parts import ModelParts, find_parts
from student_train.students.narrowing.replay import (
    at_tokens,
    first_calls,
    inputs_of,
    inputs_of_embedding_norm,
    recorded,
    run_layer,
)
from student_train.students.narrowing.sample import TokenSample

FAMILIES = ["bert", "roberta", "distilbert", "electra"]


def parts_of(folder: Any) -> ModelParts:
    parts = find_parts(AutoModel.from_pretrained(folder).eval())
    assert parts is not None
    return parts


def batches(pad_id: int) -> list[TokenSample]:
    """Two batches of rows with different padding."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for lengths in ([9, 4, 9], [6, 2]):
        real_BT = torch.arange(9) < torch.tensor(lengths)[:, None]
        ids_BT = torch.randint(5, 200, real_BT.shape, generator=generator).masked_fill(~real_BT, pad_id)
        found.append(TokenSample(input_ids_BT=ids_BT, real_BT=real_BT))
    return found


def hidden_states(parts: ModelParts, batch: TokenSample) -> tuple[Tensor, ...]:
    output = parts.base(input_ids=batch.input_ids_BT, attention_mask=batch.real_BT.long(), output_hidden_states=True)
    return output.hidden_states


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_it_is_the_model(family: str, tiny_teacher: Any) -> None:
    parts = parts_of(tiny_teacher(family))
    given = batches(parts.base.config.pad_token_id)
    calls = first_calls(parts, given)
    expected = [hidden_states(parts, batch) for batch in given]
    hidden = [call.hidden_BTD for call in calls]
    for number, layer in enumerate(parts.layers):
        torch.testing.assert_close(
            at_tokens(calls, hidden),
            torch.cat([states[number][batch.real_BT] for states, batch in zip(expected, given, strict=True)]),
        )
        hidden = [run_layer(layer.module, call, hidden_BTD) for call, hidden_BTD in zip(calls, hidden, strict=True)]
    assert len(at_tokens(calls, hidden)) == sum(batch.tokens for batch in given) == 30


@torch.no_grad()
def test_a_call_is_caught_before_the_first_layer_runs(tiny_teacher: Any) -> None:
    parts = parts_of(tiny_teacher("bert"))
    ran: list[nn.Module] = []
    hook = parts.layers[0].query.register_forward_hook(lambda module, *_: ran.append(module))
    assert len(first_calls(parts, batches(0))) == 2 and not ran
    hook.remove()
    # and the model is as it was: nothing is caught any more
    assert len(hidden_states(parts, batches(0)[0])) == 5


@torch.no_grad()
def test_inputs_and_outputs_are_recorded(tiny_teacher: Any) -> None:
    parts = parts_of(tiny_teacher("bert"))
    given = batches(0)
    calls, layer = first_calls(parts, given), parts.layers[0]
    hidden = [call.hidden_BTD for call in calls]
    with recorded(inner=layer.inner, norm=layer.output_norm) as record:
        output = run_layer(layer.module, calls[0], hidden[0])
    entered, left = record["inner"]
    torch.testing.assert_close(left, layer.inner(entered))
    assert torch.equal(record["norm"][1], output)
    # outside of the context nothing is recorded
    record.clear()
    run_layer(layer.module, calls[0], hidden[0])
    assert record == {}
    found = inputs_of(layer.inner, layer.module, calls, hidden)
    assert found.shape == (30, 32)
    torch.testing.assert_close(found[:22], entered[calls[0].real_BT])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sums_of_embeddings(family: str, tiny_teacher: Any) -> None:
    """The norm of the embeddings makes of them what enters the first layer (or the projection to its width)."""
    parts = parts_of(tiny_teacher(family))
    given = batches(parts.base.config.pad_token_id)
    normed = parts.embedding_norm(inputs_of_embedding_norm(parts, given))
    if parts.projection is not None:
        normed = parts.projection(normed)
    calls = first_calls(parts, given)
    torch.testing.assert_close(normed, at_tokens(calls, [call.hidden_BTD for call in calls]))
