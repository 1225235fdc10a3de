"""What a layer's projections read, and what follows them: found by watching, and the same vectors again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import project_hidden, restarting_positions
from teacher_cache.teacher.replay import find_replay, watch_inputs
from teacher_cache.teacher.teacher import Teacher
from tests.causal_models import make_model, save_teacher

LAYER, SEQ_LEN = 3, 24
REPLAYED = ("llama", "qwen2", "mistral", "phi", "smollm3", "granite", "starcoder2", "mixtral")
OTHERS = {
    "qwen3": "a norm of each head",
    "gemma3_text": "a norm of each head",
    "olmo2": "a norm of all heads",
    "gpt2": "no positions there, one map for all three",
    "gpt_neox": "one map for all three",
    "cohere": "pairs of components instead of halves",
}


@pytest.mark.parametrize("family", REPLAYED)
def test_what_the_projections_read_gives_the_vectors_again(family: str, tmp_path: Path) -> None:
    teacher = Teacher.load(str(save_teacher(tmp_path, family, vocab_size=112)))
    found = teacher.probe_replay(LAYER, SEQ_LEN)
    assert found is not None and found.replay is not None
    teacher.start()
    ids_BT = torch.randint(1, 100, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    starts_BT = torch.zeros(3, SEQ_LEN, dtype=torch.bool)
    starts_BT[:, 0] = starts_BT[1, 5] = starts_BT[2, 1] = starts_BT[2, 20] = True
    outputs = teacher.run(
        ids_BT, torch.full((3,), SEQ_LEN), attention_layers=[LAYER], given_layers=[LAYER], starts_BT=starts_BT
    )
    assert outputs.given[LAYER].shape == (3, SEQ_LEN, 32)
    have = project_hidden(outputs.given[LAYER], found, restarting_positions(starts_BT))
    wrong = project_hidden(outputs.given[LAYER], found)
    for name in VECTORS:
        want_BTD = getattr(outputs.attention[LAYER], f"{name}_BTD")
        torch.testing.assert_close(getattr(have, f"{name}_BTD"), want_BTD, rtol=1e-4, atol=1e-4)
        if name != "value":
            assert (getattr(wrong, f"{name}_BTD") - want_BTD)[1:].abs().max() > 0.01, "positions must matter"


@pytest.mark.parametrize("family", OTHERS)
def test_other_ways_are_not_taken_for_this_one(family: str, tmp_path: Path) -> None:
    assert Teacher.load(str(save_teacher(tmp_path, family, vocab_size=112))).probe_replay(LAYER, SEQ_LEN) is None


@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
def test_a_clamp_in_place_is_seen_whether_or_not_it_changes_what_is_tried(clip: float | None, tmp_path: Path) -> None:
    found = Teacher.load(str(save_teacher(tmp_path, "olmo", clip_qkv=clip))).probe_replay(LAYER, SEQ_LEN)
    assert (found is None) == (clip is not None)


def test_layers_without_positions_and_tables_that_depend_on_the_row_are_left_alone(tmp_path: Path) -> None:
    # every fourth layer of SmolLM3 turns nothing
    assert Teacher.load(str(save_teacher(tmp_path / "a", "smollm3"))).probe_replay(4, SEQ_LEN) is None
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    teacher = Teacher.load(
        str(save_teacher(tmp_path / "b", "llama", max_position_embeddings=16, rope_parameters=scaled))
    )
    assert teacher.probe_replay(LAYER, 16) is not None, "up to the length that it was trained with nothing changes"
    assert teacher.probe_replay(LAYER, SEQ_LEN) is None


def test_half_precision_is_found_too_and_weights_are_as_they_run(tmp_path: Path) -> None:
    teacher = Teacher.load(str(save_teacher(tmp_path)), dtype="bfloat16")
    teacher.tap()
    teacher.model.to(torch.bfloat16)
    found = find_replay(teacher.model, LAYER, SEQ_LEN, torch.bfloat16)
    assert found is not None and found.width == 32
    assert torch.equal(found.projections.key.weight, found.projections.key.weight.bfloat16().float())


def test_watching_leaves_no_hooks(tmp_path: Path) -> None:
    model = make_model("llama")
    ids_BT = torch.arange(8)[None]
    with watch_inputs(model, {1: "model.layers.0.self_attn.v_proj"}) as seen:
        model(ids_BT)
    assert seen[1].shape == (1, 8, 32)
    seen.clear()
    model(ids_BT)
    assert not seen
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
