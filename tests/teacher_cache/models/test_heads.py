"""The masked-LM head alone gives the model's logits, and shows its last map where it ends in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from teacher_cache.models.heads import LMHead

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_equals_the_models_logits(
    tiny_teacher: Callable[..., Path], ragged: tuple[torch.Tensor, torch.Tensor], family: str
) -> None:
    ids_BT, mask_BT = ragged
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family)).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        want = model(ids_BT, attention_mask=mask_BT).logits
        final = model.base_model(ids_BT, attention_mask=mask_BT).last_hidden_state
        have = LMHead(model)(final[mask_BT.bool()])
    assert torch.allclose(have, want[mask_BT.bool()], atol=1e-5)
    assert dict(model.named_parameters()).keys() == parameters.keys(), "the model itself is untouched"


CONFIGURED = ["albert", "camembert", "data2vec-text", "ernie", "layoutlm", "megatron-bert", "roberta-prelayernorm"]


def random_model(family: str) -> PreTrainedModel:
    """A tiny model with biases that are not 0, as they would be at first: a forgotten one would not be noticed."""
    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *CONFIGURED])
def test_the_head_in_two_parts_equals_the_whole_head_with_gradients(
    tiny_teacher: Callable[..., Path], family: str
) -> None:
    tiny = family in FAMILIES
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family)) if tiny else random_model(family)
    names = dict(model.named_parameters()).keys()
    head, hidden_PD = LMHead(model), torch.randn(7, 32)
    whole = head(hidden_PD)
    expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()), allow_unused=True)
    last = head.projection
    assert last is not None and last is model.get_output_embeddings()
    before = head.before_projection(hidden_PD)
    assert torch.equal(torch.nn.functional.linear(before, last.weight, last.bias), whole)
    found = torch.autograd.grad(last(before).square().sum(), list(model.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert dict(model.named_parameters()).keys() == names, "the model itself is untouched"


def test_a_head_that_goes_on_after_its_last_map_is_kept_whole() -> None:
    """ESM adds a bias of its own, 0 at first: only what the logits are says so, not their values."""
    config = AutoConfig.for_model(
        "esm", vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    assert not model.lm_head.bias.any()
    assert LMHead(model).projection is None


def test_a_last_map_of_another_kind_is_kept_whole(tiny_teacher: Callable[..., Path]) -> None:
    class Halved(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) / 2

    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert"))
    model.set_output_embeddings(Halved(32, 200))
    assert LMHead(model).projection is None
