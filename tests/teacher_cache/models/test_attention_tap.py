"""A tapped model computes what it computed before, and what is recorded is what attention received."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, MPNetConfig, MPNetForMaskedLM

from teacher_cache.errors import TeacherError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from tests.causal_models import make_model

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_equals_sdpa_bit_for_bit_with_gradients(
    tiny_teacher: Callable[..., Path], ragged: tuple[torch.Tensor, torch.Tensor], family: str
) -> None:
    ids_BT, mask_BT = ragged
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family)).eval()
    logits = model(ids_BT, attention_mask=mask_BT).logits
    logits.sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    enable_tap(model)
    with record_attention(model, [2]) as recorded:
        tapped = model(ids_BT, attention_mask=mask_BT).logits
    assert torch.equal(tapped, logits)
    assert recorded.vectors[2].query_BTD.shape == (3, 20, 32)
    tapped.sum().backward()
    for name, gradient in want.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_recorded_vectors_explain_the_attention_output(
    tiny_teacher: Callable[..., Path], ragged: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Softmax attention written out from the recorded vectors gives what the layer's output projection received."""
    ids_BT, mask_BT = ragged
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert")).eval().double()
    received: list[torch.Tensor] = []
    output = model.bert.encoder.layer[1].attention.output.dense
    output.register_forward_hook(lambda module, inputs, result: received.append(inputs[0]))
    enable_tap(model)
    with torch.no_grad(), record_attention(model, [2]) as recorded:
        model(ids_BT, attention_mask=mask_BT)
    vectors = recorded.vectors[2]
    for row, length in enumerate(mask_BT.sum(1).tolist()):
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            query, key, value = (x[row, :length, part] for x in (vectors.query_BTD, vectors.key_BTD, vectors.value_BTD))
            want = torch.softmax(query @ key.T / 8**0.5, dim=1) @ value
            assert torch.allclose(received[0][row, :length, part], want, atol=1e-12)


def test_families_that_record_nothing_are_refused_by_name() -> None:
    config = MPNetConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(TeacherError, match="'mpnet'.*--targets logits,hidden"):
        enable_tap(MPNetForMaskedLM(config))


def test_a_model_that_bypasses_the_tap_is_noticed(tiny_teacher: Callable[..., Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert"))
    with pytest.raises(TeacherError, match="0 of its 4 layers"), record_attention(model, [1]):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(("family", "what"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("granite_swa", "s_aux")])
def test_what_sdpa_cannot_do_is_refused_by_name(family: str, what: str) -> None:
    """Gemma 2 caps its attention scores, which SDPA does not; gpt-oss has sinks, which SDPA does not know."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {family}")
    model = make_model(family)
    enable_tap(model)
    refusal = pytest.raises(TeacherError, match=f"'{family}'.*{what}.*--targets logits,hidden")
    with refusal, record_attention(model, [1]):
        model.base_model(torch.tensor([[5, 6]]), use_cache=False)
