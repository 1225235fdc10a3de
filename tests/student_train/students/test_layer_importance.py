"""Layers chosen by what the cached distribution loses without them: the same as from models that really lack them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DebertaV2Config, DebertaV2ForMaskedLM, PreTrainedModel

from student_train.losses.distributions import SampledTargets
from student_train.settings import TrainSettings
from student_train.students.layer_importance import LayerChoice, RowsWithTargets, _mean_loss, _Prunable, choose_layers
from student_train.students.student import BuiltStudent, build_student, plan_student
from student_train.train.prepare import prepare_run
from teacher_cache.contract.batch import Places, TargetBatch
from teacher_cache.errors import SettingsError
from tests.causal_models import VOCABULARY, make_model, save_teacher

ROWS, LENGTH, DRAWS = 3, 14, 6
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "granite"]


def drawn_rows(teacher: PreTrainedModel, *, seed: int = 0, isolated: bool = False) -> RowsWithTargets:
    """Random rows with draws from what the teacher says after each token; the last row is shorter."""
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, len(VOCABULARY), (ROWS, LENGTH), generator=draw)
    starts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    starts_BT[:, 0] = starts_BT[:, 5] = True
    count_B = torch.tensor([LENGTH - 1, LENGTH - 1, 7])
    positions_BM = torch.arange(LENGTH - 1).repeat(ROWS, 1).masked_fill(
        torch.arange(LENGTH - 1) >= count_B[:, None], 0
    )  # fmt: skip
    places = Places(positions_BM=positions_BM, label_ids_BM=positions_BM, count_B=count_B)
    with torch.no_grad():
        logits_BTV = teacher(ids_BT, use_cache=False).logits
    drawn_PK = torch.multinomial(logits_BTV.softmax(-1)[:, :-1].flatten(0, 1), DRAWS, replacement=True, generator=draw)
    real_P = places.real_BM().flatten()
    return RowsWithTargets(
        batch=TargetBatch(
            input_ids_BT=ids_BT,
            length_B=count_B + 1,
            row_id_B=torch.arange(ROWS),
            places=places,
            starts_BT=starts_BT if isolated else None,
        ),
        targets=SampledTargets(drawn_PK, torch.ones_like(drawn_PK), real_P),
        temperature=1.0,
    )


def drawn_batch(ids_BT: Tensor, length_B: Tensor) -> TargetBatch:
    """Rows alone."""
    return TargetBatch(input_ids_BT=ids_BT, length_B=length_B, row_id_B=torch.arange(len(ids_BT)))


def without(folder: Path, layers: tuple[int, ...]) -> PreTrainedModel:
    """A model of these layers of the teacher and no others."""
    plan = plan_student(
        f"{len(layers)}x32",
        teacher_folder=folder,
        init="teacher:" + ",".join(map(str, layers)),
        with_mlm_head=True,
        seq_len=LENGTH,
    )
    return build_student(plan, seed=0).model.eval()


def cut(teacher: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """The same in milliseconds, of families whose layers do not ask which number they have."""
    model = deepcopy(teacher)
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for layer in range(len(stack), 0, -1):
        if layer not in layers:
            del stack[layer - 1]
    return model


@torch.no_grad()
def loss_without(model: PreTrainedModel, layers: tuple[int, ...], rows: RowsWithTargets) -> float:
    """What layers are chosen by: the mean loss of the model that has these layers alone."""
    with _Prunable.of(model) as prunable:
        prunable.trace(range(1, prunable.depth + 1), rows.batch)
        return _mean_loss(model, prunable.trace(layers, rows.batch)[1], rows)


@torch.no_grad()
def exact_loss(model: PreTrainedModel, rows: RowsWithTargets) -> float:
    """Mean over the places of the cross-entropy of the draws, in float64, row by row."""
    model, losses = model.double(), list[Tensor]()
    assert rows.batch.places is not None and isinstance(rows.targets, SampledTargets)
    drawn_BMK = rows.targets.ids_PK.view(ROWS, LENGTH - 1, DRAWS)
    for row, count in enumerate(rows.batch.places.count_B.tolist()):
        log_probs_TV = model(rows.batch.input_ids_BT[row : row + 1], use_cache=False).logits[0].log_softmax(-1)
        losses.append(-log_probs_TV[:count].gather(1, drawn_BMK[row, :count]).mean(1))
    model.float()
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_left_out_is_a_layer_that_is_not_there(family: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path, family)
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = drawn_rows(teacher)
    # the loss of draws has a constant that cross-entropy has not
    whole, exact = loss_without(teacher, (1, 2, 3, 4), rows), exact_loss(teacher, rows)
    for layers in [(1, 3, 4), (2, 3), (1, 4), (3,)]:
        expected = exact_loss(without(folder, layers), rows) - exact
        assert abs(expected) > 1e-3
        assert loss_without(teacher, layers, rows) - whole == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_is_that_of_brute_force(family: str, seed: int, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path, family, seed=seed)
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = drawn_rows(teacher, seed=seed)
    kept: tuple[int, ...] = (1, 2, 3, 4)
    for count in (3, 2, 1):
        candidates = list(combinations(kept, count))
        kept = min(candidates, key=lambda layers: exact_loss(cut(teacher, layers), rows))
        choice = choose_layers(teacher, count, rows)
        assert choice.layers == kept
        assert set(choice.layers) | set(choice.removed) == {1, 2, 3, 4} and len(choice.losses) == 5 - count


def test_layers_that_hand_on_more_than_states_are_left_out() -> None:
    """DeBERTa's give their attention too, and its encoder takes the two apart."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    teacher = DebertaV2ForMaskedLM(config).eval()
    batch = drawn_batch(torch.randint(1, 50, (2, LENGTH)), torch.tensor([LENGTH, 9]))
    with torch.no_grad(), _Prunable.of(teacher) as prunable:
        entering, _ = prunable.trace((1, 2, 3, 4), batch)
        found = prunable.run_from(3, entering[3], (1, 2, 4), batch)
    with torch.no_grad():
        real_BT = batch.real_BT().long()
        expected = cut(teacher, (1, 2, 4)).base_model(batch.input_ids_BT, attention_mask=real_BT).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    teacher = make_model("llama")
    rows, ids_BT = drawn_rows(teacher), torch.arange(1, 9)[None]
    before = teacher(ids_BT).logits
    names = [set(vars(layer)) for layer in teacher.model.layers]
    choose_layers(teacher, 2, rows)
    assert torch.equal(teacher(ids_BT).logits, before)
    assert [set(vars(layer)) for layer in teacher.model.layers] == names


def test_a_layer_that_does_nothing_goes_first(tmp_path: Path) -> None:
    teacher = make_model("llama")
    with torch.no_grad():
        teacher.model.layers[1].self_attn.o_proj.weight.zero_()
        teacher.model.layers[1].mlp.down_proj.weight.zero_()
    for isolated in (False, True):
        choice = choose_layers(teacher, 3, drawn_rows(teacher, isolated=isolated))
        assert choice.layers == (1, 3, 4) and choice.removed == (2,)
        assert choice.losses[1] == pytest.approx(choice.losses[0], abs=1e-6)
        assert str(choice) == "chosen by the loss without each (+0.000 nats on 33 cached distributions)"


def build(folder: Path, spec: str, rows: RowsWithTargets | None, **options: Any) -> BuiltStudent:
    plan = plan_student(
        spec,
        teacher_folder=folder,
        with_mlm_head=True,
        seq_len=LENGTH,
        **{"init": "teacher:importance", "has_distribution": True, **options},
    )

    def read() -> RowsWithTargets:
        assert rows is not None
        return rows

    return build_student(plan, seed=0, read_targets=read)


def test_a_student_gets_the_layers_and_the_settings_that_go_with_them(tmp_path: Path) -> None:
    # every other layer has a window
    folder = save_teacher(tmp_path, "gemma2")
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = drawn_rows(teacher)
    choice: LayerChoice = choose_layers(teacher, 2, rows)
    built = build(folder, "2x32", rows)
    assert built.model.config.layer_types == [teacher.config.layer_types[layer - 1] for layer in choice.layers]
    assert built.whole_layers and built.copied[1:3] == tuple(
        f"layer {number} from teacher layer {layer}" for number, layer in enumerate(choice.layers, start=1)
    )
    assert built.description.endswith(f"copied from the teacher; layers {choice}")
    assert exact_loss(built.model.eval(), rows) == pytest.approx(exact_loss(without(folder, choice.layers), rows))


def test_decoders_let_the_rows_choose_where_layers_go_and_can_be_taken_over(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = drawn_rows(teacher)
    chosen = build(folder, "2x32", rows, init="auto")
    assert chosen.copied == build(folder, "2x32", rows).copied and "; layers chosen by the loss" in chosen.description
    # nothing to leave out, nothing said, no way to take layers over, no distribution: no row is read
    for spec, options in {
        "4x32": {},
        "2x32": {"init": "teacher:last"},
        "2x64:8": {},
        "3x32": {"has_distribution": False},
    }.items():
        assert "chosen" not in build(folder, spec, None, **{"init": "auto", **options}).description


def test_where_no_position_has_a_distribution_layers_are_uniform_or_refused(tmp_path: Path) -> None:
    """Every layer could be missed as well: the first of them would go, which says nothing."""
    folder = save_teacher(tmp_path)
    rows = drawn_rows(AutoModelForCausalLM.from_pretrained(folder).eval())
    none = replace(rows, targets=rows.targets._replace(real_P=torch.zeros_like(rows.targets.real_P)))
    assert rows.places == 2 * (LENGTH - 1) + 7 and not none.places
    found = build(folder, "2x32", none, init="auto")
    assert (
        "chosen" not in found.description and found.copied == build(folder, "2x32", None, init="teacher:uniform").copied
    )
    with pytest.raises(SettingsError, match="'teacher:importance': no position of the first 3 rows .* --positions"):
        build(folder, "2x32", none)


def test_without_cached_distributions_it_is_refused(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    with pytest.raises(SettingsError, match="'teacher:importance' chooses layers by.* and this cache holds none: give"):
        build(folder, "2x32", None, has_distribution=False)


@pytest.mark.parametrize("logits", ["topk", "sample"])
def test_encoders_choose_by_their_masked_positions_where_they_are_asked_to(
    logits: str, make_tiny_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = tmp_path / "cache.zarr"
    make_tiny_store(store, targets="logits", logits=logits, max_rows=24, block_rows=8)
    settings = TrainSettings(cache=(str(store),), method="od", student="2x32", steps=1, device="cpu")
    chosen = prepare_run(replace(settings, init="teacher:importance")).built
    assert "; layers chosen by the loss without each (" in chosen.description and chosen.whole_layers
    assert prepare_run(settings).built.description.endswith("layers 2, 4 copied from the teacher")
