"""Fidelity measures against plain float64 arithmetic, and against a student that is the teacher itself."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForMaskedLM, MPNetConfig, MPNetForMaskedLM

from student_train.evaluate.fidelity.fidelity import FidelitySums, measure_fidelity, run_student
from student_train.evaluate.fidelity.plan import FidelityPlan, HiddenPair, RelationPair
from student_train.evaluate.fidelity.records import FidelityReport
from student_train.evaluate.load import LoadedStudent, load_student
from teacher_cache.contract.batch import Places, SampledLogits, TargetBatch, TopkLogits
from teacher_cache.errors import StudentError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from tests.plain_ridge import plain_ridge_error

ROWS, POSITIONS, PLACES, VOCABULARY = 6, 20, 3, 200


def make_targets(teacher: Path, entries: int, temperature: float) -> TargetBatch:
    """What a cache would hold of a teacher, from a forward pass written out here. Rows differ in length."""
    generator = torch.Generator().manual_seed(7)
    length_B = torch.tensor([20, 20, 13, 20, 9, 20])
    ids_BT = torch.randint(5, VOCABULARY, (ROWS, POSITIONS), generator=generator)
    real_BT = torch.arange(POSITIONS)[None] < length_B[:, None]
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    enable_tap(model)
    with torch.no_grad(), record_attention(model, (3,)) as recorded:
        output = model(ids_BT.where(real_BT, 0), attention_mask=real_BT.long(), output_hidden_states=True)
    count_B = torch.tensor([3, 2, 1, 3, 1, 2])
    positions_BM = torch.randint(0, 9, (ROWS, PLACES), generator=generator)
    logits_BMV = output.logits.take_along_dim(positions_BM.unsqueeze(-1), 1)
    log_p_BMV = (logits_BMV.double() / temperature).log_softmax(-1)
    top = log_p_BMV.topk(entries)
    rest = torch.log1p(-top.values.exp().sum(-1)) if entries < VOCABULARY else torch.full((ROWS, PLACES), -torch.inf)
    return TargetBatch(
        input_ids_BT=ids_BT.where(real_BT, 0),
        length_B=length_B,
        row_id_B=torch.arange(ROWS),
        hidden={layer: output.hidden_states[layer] for layer in (2, 4)},
        attention=recorded.vectors,
        places=Places(positions_BM=positions_BM, label_ids_BM=positions_BM, count_B=count_B),
        logits=TopkLogits(ids_BMK=top.indices, log_probs_BMK=top.values.float(), log_tail_BM=rest.float()),
    )


def make_plan() -> FidelityPlan:
    return FidelityPlan(
        rows=(range(100, 100 + ROWS),),
        held_out=True,
        relations=(RelationPair(student_layer=4, teacher_layer=3, heads=4, view="plain"),),
        hidden=(
            HiddenPair(student_layer=2, teacher_layer=2, view="plain"),
            HiddenPair(student_layer=4, teacher_layer=4, view="plain"),
        ),
        logits_view="plain",
        notes=(),
    )


def measure(
    student: LoadedStudent, targets: TargetBatch, *, batch: int, plan: FidelityPlan, temperature: float
) -> FidelityReport:
    measurement = FidelitySums(plan, student, temperature=temperature)
    with torch.no_grad():
        for first in range(0, ROWS, batch):
            measurement.add("plain", targets.rows(first, first + batch), 100 + first)
    return measurement.report("student", "cache")


def plain_relation_kl(
    teacher_BTD: torch.Tensor, student_BTD: torch.Tensor, length_B: torch.Tensor, heads: int
) -> float:
    total, count = 0.0, 0
    for teacher_TD, student_TD, length in zip(teacher_BTD.double(), student_BTD.double(), length_B, strict=True):
        for t, s in zip(
            teacher_TD[:length].tensor_split(heads, 1), student_TD[:length].tensor_split(heads, 1), strict=True
        ):
            p, q = ((x @ x.T / x.shape[1] ** 0.5).softmax(1) for x in (t, s))
            total += float((p * (p / q).log()).sum()) / heads
        count += int(length)
    return total / count


@pytest.mark.parametrize(("entries", "temperature"), [(VOCABULARY, 1.0), (8, 1.0), (8, 2.0)])
def test_measures_against_plain_arithmetic(tiny_teacher: Any, entries: int, temperature: float) -> None:
    teacher, folder = tiny_teacher("bert"), tiny_teacher("bert", seed=1)
    targets, student = make_targets(teacher, entries, temperature), load_student(folder)
    report = measure(student, targets, batch=4, plan=make_plan(), temperature=temperature)
    with torch.no_grad():
        outputs = run_student(student, targets, {4})

    relation = report.relations[0]
    for name in ("query", "key", "value"):
        vectors = (
            getattr(side[layer], f"{name}_BTD") for side, layer in ((targets.attention, 3), (outputs.attention, 4))
        )
        assert getattr(relation, name) == pytest.approx(plain_relation_kl(*vectors, targets.length_B, 4), rel=1e-4)
    assert relation.total == pytest.approx(relation.query + relation.key + relation.value)

    real_BT = targets.real_BT()
    for pair in report.hidden:
        x, y = outputs.hidden[pair.student_layer].double(), targets.hidden[pair.teacher_layer].double()
        halves = [(x[rows][real_BT[rows]], y[rows][real_BT[rows]]) for rows in (slice(0, 3), slice(3, 6))]
        assert pair.nmse == pytest.approx(plain_ridge_error(*halves[0], *halves[1], pair.ridge), rel=1e-3)

    assert report.distribution is not None and targets.places is not None and targets.logits is not None
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits_BTV = model(targets.input_ids_BT, attention_mask=real_BT.long()).logits.double()
    kl, agreed, count = 0.0, 0, 0
    for row in range(ROWS):
        for place in range(int(targets.places.count_B[row])):
            logits_V = logits_BTV[row, targets.places.positions_BM[row, place]]
            q_V = (logits_V / temperature).softmax(0)
            ids_K = targets.logits.ids_BMK[row, place]
            p_K = targets.logits.log_probs_BMK[row, place].double().exp()
            kl += float((p_K * (p_K / q_V[ids_K]).log()).sum())
            if entries < VOCABULARY:
                kl += float((1 - p_K.sum()) * ((1 - p_K.sum()) / (1 - q_V[ids_K].sum())).log())
            agreed += int(logits_V.argmax() == ids_K[p_K.argmax()])
            count += 1
    assert report.distribution.positions == count == 12
    assert report.distribution.kl == pytest.approx(kl / count, rel=1e-4)
    assert report.distribution.top1_agreement == pytest.approx(agreed / count)
    assert report.tokens == int(targets.length_B.sum())


def test_draws_stand_for_the_distribution(tiny_teacher: Any) -> None:
    targets, folder = make_targets(tiny_teacher("bert"), 3, 1.0), tiny_teacher("bert", seed=1)
    counts_BMK = torch.tensor([2, 5, 1]).expand(ROWS, PLACES, 3)
    ids_BMK = torch.arange(ROWS * PLACES * 3).view(ROWS, PLACES, 3)
    # a fourth id that was never drawn
    drawn = SampledLogits(ids_BMK=pad(ids_BMK, (0, 1), value=1), counts_BMK=pad(counts_BMK, (0, 1)))
    targets = replace(targets, logits=drawn)
    report = measure(load_student(folder), targets, batch=4, plan=make_plan(), temperature=2.0)
    model, masked = AutoModelForMaskedLM.from_pretrained(folder).eval(), targets.places
    assert report.distribution is not None and masked is not None
    with torch.no_grad():
        logits_BTV = model(targets.input_ids_BT, attention_mask=targets.real_BT().long()).logits.double()
    kl, agreed, count = 0.0, 0, 0
    for row in range(ROWS):
        for place in range(int(masked.count_B[row])):
            logits_V = logits_BTV[row, masked.positions_BM[row, place]]
            q_K = (logits_V / 2).softmax(0)[ids_BMK[row, place]]
            kl += sum(c / 8 * math.log(c / 8 / float(q)) for c, q in zip((2, 5, 1), q_K, strict=True))
            agreed += int(logits_V.argmax() == ids_BMK[row, place, 1])
            count += 1
    assert report.distribution.positions == count
    assert report.distribution.kl == pytest.approx(kl / count, rel=1e-4)
    assert report.distribution.top1_agreement == pytest.approx(agreed / count)


def test_batches_do_not_matter(tiny_teacher: Any) -> None:
    targets, student = make_targets(tiny_teacher("bert"), 8, 1.0), load_student(tiny_teacher("bert", seed=1))
    one, other = (measure(student, targets, batch=batch, plan=make_plan(), temperature=1.0) for batch in (1, ROWS))
    first, second = one.lines(), other.lines()
    assert first.keys() == second.keys()
    for key, found in first.items():
        assert found.value == pytest.approx(second[key].value, rel=1e-4), key


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert", "modernbert", "electra"])
def test_a_perfect_student(tiny_teacher: Any, family: str) -> None:
    """The teacher measured against itself: no divergence, no error, full agreement."""
    folder = tiny_teacher(family)
    same = RelationPair(student_layer=3, teacher_layer=3, heads=8, view="plain")
    plan = replace(make_plan(), relations=(same,))
    report = measure(load_student(folder), make_targets(folder, 8, 1.0), batch=3, plan=plan, temperature=1.0)
    assert report.relations[0].total == pytest.approx(0, abs=1e-5)
    assert [pair.nmse for pair in report.hidden] == pytest.approx([0, 0], abs=1e-4)
    assert report.distribution is not None
    assert report.distribution.kl == pytest.approx(0, abs=1e-5)
    assert report.distribution.top1_agreement == 1


def test_report_survives_json(tiny_teacher: Any) -> None:
    folder = tiny_teacher("bert")
    report = measure(load_student(folder), make_targets(folder, 8, 1.0), batch=3, plan=make_plan(), temperature=1.0)
    record = json.loads(json.dumps(report.to_json()))
    assert record["relations"][0]["total"] == pytest.approx(report.relations[0].total)
    assert FidelityReport.from_json(record) == report


def test_a_family_whose_attention_is_out_of_reach_is_measured_without(tiny_store: Path, tmp_path: Path) -> None:
    teacher = tiny_store / "teacher"
    folder = Path(shutil.copytree(teacher, tmp_path / "student"))
    (folder / "model.safetensors").unlink()
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    vocabulary = AutoConfig.from_pretrained(teacher).vocab_size
    MPNetForMaskedLM(MPNetConfig(**sizes, vocab_size=vocabulary)).save_pretrained(folder)
    report = measure_fidelity(folder, [str(tiny_store)])
    assert report.hidden and report.distribution is not None and not report.relations
    assert any(note.startswith("relations are not measured: attention of family 'mpnet'") for note in report.notes)


def test_rows_without_a_masked_position_are_no_perfect_student(
    make_tiny_store: Any, tiny_teacher: Any, tmp_path: Path
) -> None:
    """Nothing to compare would be a KL of 0: left out with a note where other measures are there, refused else."""
    (tmp_path / "a.txt").write_text("babo debo fego hugi\n" + "zz zz\n" * 30)
    corpus, teacher = tmp_path / "a.txt", tiny_teacher("bert")
    both = make_tiny_store(tmp_path / "both.zarr", corpus=corpus)
    report = measure_fidelity(teacher, [str(both)])
    assert report.distribution is None and report.relations
    assert any("none of the measured rows has a masked position" in note for note in report.notes)
    assert FidelityReport.from_json(report.to_json()) == report
    alone = make_tiny_store(tmp_path / "alone.zarr", corpus=corpus, targets="logits")
    for rows in (None, 1):
        with pytest.raises(StudentError, match=r"compared with nothing .*none of the measured rows has a masked"):
            measure_fidelity(teacher, [str(alone)], rows=rows)
