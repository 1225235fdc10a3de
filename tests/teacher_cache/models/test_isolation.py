"""Documents that share a row do not see each other, in every family that says so; the others are refused in words."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from teacher_cache.models.attention_tap import enable_tap
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.models.isolation import measure_isolation
from tests.causal_models import FAMILIES, make_model

LENGTH = 48
OTHERS = ["modernbert-decoder", "gpt_bigcode", "olmo3", "phi3"]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_decoders_keep_packed_documents_apart(family: str) -> None:
    model = make_model(family)
    found = measure_isolation(model, LENGTH, with_head=True)
    assert found.isolated and found.difference < 1e-4
    assert found.divergence is not None and abs(found.divergence) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_through_the_tap_they_stay_apart(family: str) -> None:
    model = make_model(family)
    enable_tap(model)
    assert measure_isolation(model, LENGTH, with_head=False).difference < 1e-4


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "modernbert", "distilbert", "electra", "albert"])
def test_encoders_keep_packed_documents_apart(family: str) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    found = measure_isolation(AutoModelForMaskedLM.from_config(config).eval(), LENGTH, with_head=True)
    assert found.isolated and found.difference < 1e-4


def test_windows_of_an_encoder_hold_within_a_segment() -> None:
    """A window shorter than the segments, in most layers: one mask for all layers would have widened it."""
    config = AutoConfig.for_model(
        "modernbert", vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=1, initializer_range=0.2, local_attention=8,
        global_attn_every_n_layers=3,
    )  # fmt: skip
    found = measure_isolation(AutoModelForMaskedLM.from_config(config).eval(), LENGTH, with_head=True)
    assert found.isolated and found.difference < 1e-4


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_families_without_positions_say_so(family: str) -> None:
    with pytest.raises(ValueError, match="takes no positions"):
        measure_isolation(make_model(family), LENGTH, with_head=True)


@pytest.mark.parametrize("family", ["recurrent_gemma", "opt"])
def test_families_that_carry_something_over_are_found_out(family: str) -> None:
    """A state between tokens, or a mask of ones that the family makes for itself."""
    found = measure_isolation(make_model(family), LENGTH, with_head=True)
    assert not found.isolated and found.difference > 0.1
    assert "KL(alone || packed)" in str(found)


def test_a_model_that_goes_by_its_first_row_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a build begin their segments at different places: one row alone would not have shown this."""

    def of_first_row(model, real_BT, starts_BT=None):  # type: ignore[no-untyped-def]
        starts = None if starts_BT is None else starts_BT[:1].expand_as(starts_BT)
        return forward_arguments(model, real_BT, starts)

    monkeypatch.setattr("teacher_cache.models.isolation.forward_arguments", of_first_row)
    assert not measure_isolation(make_model("llama"), LENGTH, with_head=False).isolated


def test_a_head_that_does_not_run_alone_is_no_matter_here() -> None:
    """What it says of isolation stands; `probe_head` refuses the head by name where logits are wanted."""
    model = make_model("llama")
    model.forward = lambda **inputs: model.model.no_such_multiplier  # type: ignore[method-assign]
    found = measure_isolation(model, LENGTH, with_head=True)
    assert found.isolated and found.divergence is None


def test_an_all_ones_mask_would_undo_it_and_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: Transformers takes a mask of ones for a word on all positions, and packing is forgotten."""

    def with_ones(model, real_BT, starts_BT=None):  # type: ignore[no-untyped-def]
        return {"attention_mask": real_BT.long(), **forward_arguments(model, real_BT, starts_BT)}

    monkeypatch.setattr("teacher_cache.models.isolation.forward_arguments", with_ones)
    found = measure_isolation(make_model("llama"), LENGTH, with_head=True)
    assert not found.isolated and found.divergence is not None and found.divergence > 0.01


def test_a_sliding_window_holds_within_a_segment() -> None:
    """A mask of our own for all layers would have forgotten the window: the packed row would see more than alone."""
    model = make_model("mistral", sliding_window=4)
    assert measure_isolation(model, LENGTH, with_head=False).isolated
    ids_1T = torch.arange(LENGTH)[None] % 90
    starts_1T = torch.zeros_like(ids_1T, dtype=torch.bool)
    starts_1T[0, [0, 7]] = True
    real_1T = torch.ones_like(starts_1T)
    changed_1T = ids_1T.clone()
    changed_1T[0, 7] = 91
    with torch.no_grad():
        states = [
            model.base_model(ids, **forward_arguments(model, real_1T, starts_1T)).last_hidden_state[0]
            for ids in (ids_1T, changed_1T)
        ]
    moved_T = (states[0] - states[1]).abs().amax(dim=1) > 1e-6
    # 4 layers of windows of 4 reach 3 further each
    assert moved_T.nonzero()[:, 0].tolist() == list(range(7, 7 + 4 * 3 + 1))
