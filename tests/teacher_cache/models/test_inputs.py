"""What a base model is given: masks for encoders, positions that start anew for isolated segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from teacher_cache.models.inputs import forward_arguments, restarting_positions, takes_positions
from tests.causal_models import make_model

STARTS_BT = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_positions_start_anew_with_every_segment() -> None:
    assert restarting_positions(STARTS_BT).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_a_decoder_is_given_no_mask_and_no_cache() -> None:
    model, real_BT = make_model("llama"), torch.ones_like(STARTS_BT)
    assert forward_arguments(model, real_BT) == {"use_cache": False}
    isolated = forward_arguments(model, real_BT, STARTS_BT)
    assert isolated.keys() == {"use_cache", "position_ids"} and not isolated["use_cache"]
    assert torch.equal(isolated["position_ids"], restarting_positions(STARTS_BT))
    assert takes_positions(model) and not takes_positions(make_model("bloom"))


def test_padding_behind_a_row_changes_nothing_before_it() -> None:
    model, ids_1T = make_model("llama"), torch.arange(20)[None]
    padded_1T = torch.cat([ids_1T, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    real_1T = torch.arange(29)[None] < 20
    with torch.no_grad():
        alone = model.base_model(ids_1T, **forward_arguments(model, torch.ones_like(ids_1T, dtype=torch.bool)))
        padded = model.base_model(padded_1T, **forward_arguments(model, real_1T))
    assert torch.allclose(alone.last_hidden_state, padded.last_hidden_state[:, :20], atol=1e-5)


def test_an_encoder_is_given_pairs_of_one_segment_and_padding_by_itself() -> None:
    config = AutoConfig.for_model("roberta", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=16, max_position_embeddings=20, pad_token_id=1)  # fmt: skip
    model, real_BT = AutoModelForMaskedLM.from_config(config), torch.ones_like(STARTS_BT)
    real_BT[0, 7] = False
    assert torch.equal(forward_arguments(model, real_BT)["attention_mask"], real_BT.long())
    given = forward_arguments(model, real_BT, STARTS_BT)
    mask_TT = given["attention_mask"][0, 0]
    of_segment = [0, 0, 0, 1, 1, 2, 3, 9]
    assert mask_TT.tolist() == [[a == b for b in of_segment] for a in of_segment]
    assert given["position_ids"][0].tolist() == [2, 3, 4, 2, 3, 2, 2, 3], "tables of this family begin at 2"


def test_layers_with_a_window_are_given_a_mask_of_their_own() -> None:
    config = AutoConfig.for_model("modernbert", vocab_size=50, hidden_size=16, num_hidden_layers=2, pad_token_id=1,
                                  num_attention_heads=2, intermediate_size=16, local_attention=2)  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    masks = forward_arguments(model, torch.ones_like(STARTS_BT), STARTS_BT)["attention_mask"]
    of_segment = [0, 0, 0, 1, 1, 2, 3, 3]
    assert masks["full_attention"][0, 0].tolist() == [[a == b for b in of_segment] for a in of_segment]
    near = [[abs(i - j) <= 1 for j in range(8)] for i in range(8)]
    assert masks["sliding_attention"][1, 0].tolist() == near, "half a window to each side"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_rows_without_padding_need_no_mask(family: str, tiny_teacher: Callable[..., Path]) -> None:
    model, ids_BT = AutoModel.from_pretrained(tiny_teacher(family)).eval(), torch.arange(8, 72).view(2, 32)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    given = forward_arguments(model, real_BT, unpadded=True)
    assert given == {"attention_mask": None}
    with torch.no_grad():
        found = model(ids_BT, **given).last_hidden_state
        assert torch.equal(found, model(ids_BT, **forward_arguments(model, real_BT)).last_hidden_state)
    # segments are told apart all the same
    assert forward_arguments(model, STARTS_BT, STARTS_BT, unpadded=True)["attention_mask"] is not None
