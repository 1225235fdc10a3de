"""Models in bfloat16: rotary frequencies stay exact, as they do for a model that is loaded in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from teacher_cache.models.arithmetic import move_model

POSITIONS = 1024
SHARPENED, SPREAD = {"modernbert": 4, "eurobert": 2, "esm": 4}, {"modernbert": 0.15, "eurobert": 0.1, "esm": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    # the first two keep the frequencies out of the checkpoint, with a copy of them; the last one in it
    "modernbert": {"global_attn_every_n_layers": 1, "cls_token_id": 2, "sep_token_id": 3},
    "eurobert": {"num_key_value_heads": 4},
    "esm": {"position_embedding_type": "rotary", "emb_layer_norm_before": True, "token_dropout": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any) -> PreTrainedModel:
    """A random rotary encoder in float32 whose attention looks at few positions."""
    config = AutoConfig.for_model(
        request.param, vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, initializer_range=SPREAD[request.param],
        mask_token_id=4, max_position_embeddings=POSITIONS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **FAMILIES[request.param],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith("Wqkv.weight"):
                    parameter[: 2 * config.hidden_size].mul_(SHARPENED[request.param])
                elif name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                    parameter.mul_(SHARPENED[request.param])
    return made


def floating_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def test_buffers_are_those_of_a_model_that_is_loaded_in_bfloat16(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    moved = AutoModelForMaskedLM.from_pretrained(tmp_path)
    move_model(moved, device="cpu", dtype=torch.bfloat16)
    want, have = floating_buffers(loaded), floating_buffers(moved)
    assert want and want.keys() == have.keys()
    for name, buffer in want.items():
        assert buffer.dtype == torch.float32 == have[name].dtype, name
        assert torch.equal(buffer, have[name]), name
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.bfloat16} == {moved.dtype}
    for (name, one), other in zip(loaded.named_parameters(), moved.parameters(), strict=True):
        assert torch.equal(one, other), name


@torch.inference_mode()
def test_hidden_states_of_far_positions_differ_by_the_rounding_of_weights_alone(model: PreTrainedModel) -> None:
    moved, rounded = copy.deepcopy(model), copy.deepcopy(model)
    move_model(moved, device="cpu", dtype=torch.bfloat16)
    rounded.to(torch.bfloat16)
    ids_BT = torch.randint(5, 100, (2, POSITIONS), generator=torch.Generator().manual_seed(1))

    def nmse(other: PreTrainedModel) -> float:
        want_BTD, have_BTD = (one.base_model(ids_BT).last_hidden_state.float() for one in (model, other))
        want_BTD, have_BTD = want_BTD[:, POSITIONS // 2 :], have_BTD[:, POSITIONS // 2 :]
        spread_BTD = want_BTD - want_BTD.mean(dim=(0, 1))
        return float((want_BTD - have_BTD).square().sum() / spread_BTD.square().sum())

    assert nmse(moved) < 0.01
    assert nmse(rounded) > 1.5 * nmse(moved)
