"""Student and objective together: losses on real batches of every family, dropout, and what gets no gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from student_train.losses.sums import LossSum
from student_train.methods.model import DistillationModel, freeze_unused, set_dropout
from student_train.methods.objective import make_objective
from student_train.students.student import build_student, plan_student
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest
from tests.causal_models import make_model

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]
LENGTHS = (12, 5, 9)
ALL = {"mha": 1.0, "direct": 1.0, "hs": 1.0, "od": 1.0}


def distil(
    cache: Any, shape: str = "2x24:4", methods: dict[str, float] = ALL, *, init: str = "random", **options: Any
) -> DistillationModel:
    built = build_student(
        plan_student(shape, teacher_folder=cache.folder, init=init, with_mlm_head="od" in methods, seq_len=12), seed=0
    )
    return DistillationModel(built.model, make_objective(methods, source=cache, student=built.model.config, **options))


def full_cache(live_cache: Any, folder: Path, **options: Any) -> Any:
    return live_cache(folder, hidden=(1, 2, 3, 4), attention=(3, 4), logits=True, **options)


def totals(losses: dict[str, LossSum]) -> dict[str, float]:
    return {name: loss.total.item() for name, loss in losses.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_teacher_has_nothing_to_learn(family: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher(family))
    batch = cache.batch(LENGTHS)
    copy = distil(cache, "4x32:4", init="auto", mapping="uniform", attention_layer="4")
    found = {name: loss.total.item() / loss.count.item() for name, loss in copy(batch).items()}
    assert all(abs(value) < 1e-5 for value in found.values()), found
    other = distil(cache, "4x32:4", init="random", mapping="uniform", attention_layer="4")
    assert all(loss.total.item() / loss.count.item() > 0.01 for loss in other(batch).values())


@pytest.fixture
def bert(tiny_teacher: Any, live_cache: Any) -> tuple[Any, Batch, DistillationModel, dict[str, LossSum]]:
    """A cache, a batch, a BERT student with unequal projections, and its losses on the batch."""
    cache = full_cache(live_cache, tiny_teacher(), temperature=2.0)
    batch = cache.batch(LENGTHS)
    model = distil(cache, relation_heads=4, relation_weights=(1.0, 2.0, 0.5))
    with torch.no_grad():
        for name, parameter in model.objective.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(std=0.3)
        losses = model(batch)
    assert {name: loss.count.item() for name, loss in losses.items()} == {"mha": 26, "direct": 26, "hs": 26, "od": 9}
    model.student.double().eval()
    return cache, batch, model, losses


@torch.no_grad()
def plain_outputs(model: DistillationModel, targets: TargetBatch) -> Any:
    return model.student(
        input_ids=targets.input_ids_BT.long(), attention_mask=targets.real_BT().long(), output_hidden_states=True
    )


# each loss again in float64 loops, from nothing but the student's plain outputs


def test_hidden_states_of_bert_step_by_step(bert: Any) -> None:
    cache, batch, model, losses = bert
    hidden = plain_outputs(model, batch["plain"]).hidden_states
    expected = 0.0
    for student_layer, teacher_layer in ((1, 2), (1, 3), (2, 4)):
        projection = model.objective.projections["hs"][f"student_{student_layer}_teacher_{teacher_layer}"].double()
        target = batch["plain"].hidden[teacher_layer].double()
        for row, length in enumerate(LENGTHS):
            for i in range(length):
                mapped = projection.weight @ hidden[student_layer][row, i] + projection.bias
                expected += (mapped - target[row, i]).square().sum().item() / cache.hidden_variance(teacher_layer)
    assert losses["hs"].total.item() == pytest.approx(expected, rel=1e-4)


def test_relations_of_bert_step_by_step(bert: Any) -> None:
    _, batch, model, losses = bert
    hidden = plain_outputs(model, batch["plain"]).hidden_states
    attention, taught = model.student.bert.encoder.layer[1].attention.self, batch["plain"].attention[3]
    expected = 0.0
    for weight, linear, target in (
        (1.0, attention.query, taught.query_BTD),
        (2.0, attention.key, taught.key_BTD),
        (0.5, attention.value, taught.value_BTD),
    ):
        for row, length in enumerate(LENGTHS):
            vectors = linear(hidden[1][row, :length])
            for head in range(4):
                logs = []
                for x, width in ((target[row, :length].double(), 8), (vectors, 6)):
                    part = x[:, head * width : (head + 1) * width]
                    logs.append((part @ part.T / math.sqrt(width)).log_softmax(1))
                expected += weight * (logs[0].exp() * (logs[0] - logs[1])).sum().item() / 4
    assert losses["mha"].total.item() == pytest.approx(expected, rel=1e-4)


def test_vectors_of_bert_step_by_step(bert: Any) -> None:
    cache, batch, model, losses = bert
    hidden = plain_outputs(model, batch["plain"]).hidden_states
    attention, taught = model.student.bert.encoder.layer[1].attention.self, batch["plain"].attention[3]
    sample = cache.read_rows(0, cache.manifest.rows, TargetRequest(attention_layers=(3,)))["plain"]
    real = torch.arange(12)[None, :] < sample.length_B[:, None]
    expected = 0.0
    for weight, name in ((1.0, "query"), (2.0, "key"), (0.5, "value")):
        seen = getattr(sample.attention[3], f"{name}_BTD")[real].double()
        variance = (seen - seen.mean(0)).square().sum(1).mean()
        projection = model.objective.projections["direct"][f"student_2_teacher_3_{name}"].double()
        target = getattr(taught, f"{name}_BTD")
        for row, length in enumerate(LENGTHS):
            mapped = getattr(attention, name)(hidden[1][row, :length]) @ projection.weight.T + projection.bias
            expected += weight * (mapped - target[row, :length].double()).square().sum().item() / variance.item()
    assert losses["direct"].total.item() == pytest.approx(expected, rel=1e-4)


def test_distribution_of_bert_step_by_step(bert: Any) -> None:
    _, batch, model, losses = bert
    places, taught = batch["masked"].places, batch["masked"].logits
    logits = plain_outputs(model, batch["masked"]).logits
    expected = 0.0
    for row, count in enumerate(places.count_B.tolist()):
        for place in range(count):
            q = (logits[row, int(places.positions_BM[row, place])] / 2).softmax(0)
            kept = taught.ids_BMK[row, place].long()
            log_p, rest = taught.log_probs_BMK[row, place].double(), taught.log_tail_BM[row, place].double()
            expected += 4 * (log_p.exp() * (log_p - q[kept].log())).sum().item()
            expected += 4 * (rest.exp() * (rest - (1 - q[kept].sum()).log())).item()
    assert losses["od"].total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_do_not_depend_on_padding_or_on_how_rows_are_batched(
    family: str, tiny_teacher: Any, live_cache: Any
) -> None:
    cache = full_cache(live_cache, tiny_teacher(family))
    batch = cache.batch(LENGTHS)
    model = distil(cache)
    whole = totals(model(batch))
    parts = [totals(model({view: rows.rows(n, n + 1) for view, rows in batch.items()})) for n in range(3)]
    for name, total in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(total, rel=1e-4)
    # other ids at padding, and other targets there, change nothing
    for view, rows in batch.items():
        padding = ~rows.real_BT()
        for tensor in (*rows.hidden.values(), *(x for v in rows.attention.values() for x in vars(v).values())):
            tensor[padding] = 1e4
        assert view in ("plain", "masked")
    for name, total in totals(model(batch)).items():
        assert total == pytest.approx(whole[name], rel=1e-5)


def test_only_the_needed_views_are_run(tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher())
    batch = cache.batch(LENGTHS)
    model = distil(cache, methods={"hs": 1.0})
    seen: list[Tensor] = []
    model.student.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    model(batch)
    assert len(seen) == 1 and torch.equal(seen[0], batch["plain"].input_ids_BT.long())


def test_half_precision_students_get_losses_in_float32(tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher())
    batch = cache.batch(LENGTHS)
    exact = totals(distil(cache)(batch))
    half = distil(cache).bfloat16()(batch)
    for name, loss in half.items():
        assert loss.total.dtype == torch.float32
        assert loss.total.item() == pytest.approx(exact[name], rel=0.1)


# ---- dropout --------------------------------------------------------------------------------------------------------


def encode(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(5, 45).view(2, 20)).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_everywhere_and_the_configuration_untouched(family: str, tiny_teacher: Any) -> None:
    rates = {name: 0.3 for name in vars(AutoModel.from_pretrained(tiny_teacher(family)).config) if "dropout" in name}
    rates.pop("classifier_dropout", None)
    model = AutoModel.from_pretrained(tiny_teacher(family), **rates).train()
    configured = model.config.to_dict()
    assert not torch.equal(encode(model), encode(model))
    set_dropout(model, 0.0)
    assert torch.equal(encode(model), encode(model.train()))
    trained = encode(model.train())
    torch.testing.assert_close(trained, encode(model.eval()), rtol=1e-4, atol=1e-5)
    assert model.config.to_dict() == configured
    set_dropout(model, 0.5)
    assert not torch.equal(encode(model.train()), encode(model))


@pytest.mark.parametrize(("family", "rate"), [("opt", "layerdrop"), ("mixtral", "router_jitter_noise")])
def test_neither_layers_nor_inputs_of_experts_are_left_to_chance(family: str, rate: str) -> None:
    model, ids_BT = make_model(family, **{rate: 0.6}), torch.arange(1, 25)[None]
    expected = model.base_model(ids_BT, use_cache=False).last_hidden_state
    model.train()
    assert not torch.allclose(model.base_model(ids_BT, use_cache=False).last_hidden_state, expected, atol=1e-3)
    set_dropout(model, 0.0)
    found = model.base_model(ids_BT, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_training_student_repeats_its_losses(tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher())
    batch = cache.batch(LENGTHS)
    model = distil(cache).train()
    assert totals(model(batch)) == totals(model(batch))
    noisy = DistillationModel(model.student, model.objective, dropout=0.3).train()
    assert totals(noisy(batch)) != totals(noisy(batch))


# ---- what gets no gradient ------------------------------------------------------------------------------------------


def frozen(cache: Any, batch: Batch, methods: dict[str, float], **options: Any) -> set[str]:
    model = distil(cache, methods=methods, **options)
    names = freeze_unused(model, batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(names)
    return set(names)


def test_freezing_what_the_losses_do_not_reach(tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher())
    batch = cache.batch(LENGTHS)
    last = "student.encoder.layer.1."
    above = "attention.output.dense attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm".split()
    upper = {f"{last}{part}.{kind}" for part in above for kind in ("weight", "bias")}
    assert frozen(cache, batch, {"mha": 1.0}) == upper
    values = {f"{last}attention.self.value.{kind}" for kind in ("weight", "bias")}
    assert frozen(cache, batch, {"mha": 1.0}, relation_weights=(1, 1, 0)) == upper | values
    assert frozen(cache, batch, {"hs": 1.0}, mapping="last1") == set()
    everything_above = {name for name in frozen(cache, batch, {"hs": 1.0}, mapping="1:2") if ".layer.1." in name}
    assert upper | values < everything_above
    assert frozen(cache, batch, {"od": 1.0}) == set()
    assert frozen(cache, batch, {"mha": 1.0, "hs": 1.0}) == set()


def test_training_moves_every_loss_down(tiny_teacher: Any, live_cache: Any) -> None:
    cache = full_cache(live_cache, tiny_teacher())
    batch = cache.batch((12, 12, 9, 12))
    model = distil(cache).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = totals(model(batch))
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack([loss.total / loss.count for loss in model(batch).values()]).sum().backward()
        optimizer.step()
    last = totals(model(batch))
    assert all(last[name] < 0.7 * first[name] for name in first), (first, last)


def test_the_real_teacher_teaches_a_copied_student(shared_teacher: Path, live_cache: Any) -> None:
    cache = live_cache(shared_teacher, hidden=(2, 4, 5, 6), attention=(5,), logits=True)
    batch = cache.batch((12, 7))
    # vectors of another layer may well be further off than none: they have no order among layers
    methods = {name: weight for name, weight in ALL.items() if name != "direct"}
    copied = distil(cache, "3x384", methods, init="auto")
    random = distil(cache, "3x384", methods, init="random")
    for name, loss in random(batch).items():
        assert 0 < copied(batch)[name].total.item() < loss.total.item(), name
    masked_lm = AutoModelForMaskedLM.from_pretrained(shared_teacher)
    assert copied.student.config.vocab_size == masked_lm.config.vocab_size == 30522
