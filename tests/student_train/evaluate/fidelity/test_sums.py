"""Each measure by itself, on a few random vectors, against arithmetic written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student_train.evaluate.fidelity.plan import HiddenPair, RelationPair
from student_train.evaluate.fidelity.sums import DistributionSum, HiddenSum, RelationSum
from student_train.methods.base import StudentOutputs
from teacher_cache.contract.batch import AttentionVectors, Places, SampledLogits, TargetBatch, TopkLogits
from tests.plain_ridge import plain_ridge_error

LENGTHS = [7, 3, 5, 7]
NO_OUTPUT = torch.zeros(0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(rows: int = len(LENGTHS), **found: object) -> TargetBatch:
    length_B = torch.tensor(LENGTHS[:rows])
    ids_BT = torch.zeros(rows, 7, dtype=torch.int32)
    return TargetBatch(input_ids_BT=ids_BT, length_B=length_B, row_id_B=torch.arange(rows), **found)  # type: ignore[arg-type]


def outputs_of(**found: object) -> StudentOutputs:
    return StudentOutputs(**{"hidden": {}, "attention": {}, "last_hidden_BTD": NO_OUTPUT, **found})  # type: ignore[arg-type]


def attention_of(width: int, seed: int) -> AttentionVectors:
    query, key, value = (random(len(LENGTHS), 7, width, seed=seed + part) for part in range(3))
    return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)


def test_relations() -> None:
    """Heads of 4 components of the teacher against heads of 2 of the student; padding counts nowhere."""
    student, teacher = attention_of(4, 0), attention_of(8, 10)
    summed = RelationSum(RelationPair(student_layer=2, teacher_layer=3, heads=2, view="plain"))
    summed.add(outputs_of(attention={2: student}), targets_of(attention={3: teacher}))
    found = summed.result()
    assert (found.student_layer, found.teacher_layer, found.heads, found.view) == (2, 3, 2, "plain")
    for name in ("query", "key", "value"):
        x_BTD, s_BTD = (getattr(each, f"{name}_BTD").double() for each in (teacher, student))
        total = 0.0
        for x_TD, s_TD, length in zip(x_BTD, s_BTD, LENGTHS, strict=True):
            for x, s in zip(x_TD[:length].chunk(2, 1), s_TD[:length].chunk(2, 1), strict=True):
                p, q = ((vectors @ vectors.T / vectors.shape[1] ** 0.5).softmax(1) for vectors in (x, s))
                total += float((p * (p / q).log()).sum()) / 2
        assert getattr(found, name) == pytest.approx(total / sum(LENGTHS), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 24])
def test_hidden_states(batch: int) -> None:
    """The map is fitted on rows 30 to 41 and measured on rows 42 to 53, however they are cut into batches."""
    rows, width = 24, 3
    length_B = torch.tensor(LENGTHS).repeat(6)
    real_BT = torch.arange(7) < length_B[:, None]
    student_BTD = random(rows, 7, width, seed=1)
    teacher_BTD = student_BTD @ random(width, 5, seed=2) + 0.3 * random(rows, 7, 5, seed=3) + 2
    summed = HiddenSum(HiddenPair(student_layer=1, teacher_layer=2, view="plain"), (range(30, 54),))
    for start in range(0, rows, batch):
        part = slice(start, start + batch)
        targets = TargetBatch(
            input_ids_BT=real_BT[part].int(), length_B=length_B[part], row_id_B=length_B[part],
            hidden={2: teacher_BTD[part]},
        )  # fmt: skip
        summed.add(outputs_of(hidden={1: student_BTD[part]}), targets, 30 + start)
    found = summed.result()
    x, y = student_BTD.double(), teacher_BTD.double()
    halves = [(x[part][real_BT[part]], y[part][real_BT[part]]) for part in (slice(0, 12), slice(12, 24))]
    assert found.nmse == pytest.approx(plain_ridge_error(*halves[0], *halves[1], found.ridge), rel=1e-4)
    assert 0.001 < found.nmse < 0.5
    assert (found.student_layer, found.teacher_layer, found.view) == (1, 2, "plain")


def test_sinks_do_not_make_a_student_look_perfect() -> None:
    """First tokens a thousand times as large, which a student predicts: the error is that of the others."""
    student_BTD, teacher_BTD = random(4, 7, 3, seed=1), random(4, 7, 5, seed=2)
    first_BT = torch.zeros(4, 7, dtype=torch.bool)
    first_BT[:, 0] = True
    student_BTD[:, 0], teacher_BTD[:, 0] = 1000.0, 1000.0
    found = []
    for sinks in ({2: first_BT}, {}):
        summed = HiddenSum(HiddenPair(student_layer=1, teacher_layer=2, view="plain"), (range(4),))
        summed.add(outputs_of(hidden={1: student_BTD}), targets_of(hidden={2: teacher_BTD}, hidden_sinks=sinks), 0)
        found.append(summed.result())
    x, y = student_BTD.double(), teacher_BTD.double()
    rows = [range(1, length) for length in LENGTHS]
    halves = [
        tuple(torch.cat([values[row, list(rows[row])] for row in part]) for values in (x, y))
        for part in ((0, 1), (2, 3))
    ]
    assert found[0].nmse == pytest.approx(plain_ridge_error(*halves[0], *halves[1], found[0].ridge), rel=1e-4)
    assert found[1].nmse < 1e-3 < 0.5 < found[0].nmse


def test_of_two_rows_one_is_fitted_and_the_other_measured() -> None:
    """The row to fit on is cut in its middle, to choose the ridge."""
    summed = HiddenSum(HiddenPair(student_layer=1, teacher_layer=1, view="plain"), (range(5, 7),))
    part_BT = summed._part_BT(targets_of(2), 5)
    assert part_BT.tolist() == [[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, -1, -1, -1, -1]]
    # of two stores, each gives the half of its rows
    summed = HiddenSum(HiddenPair(student_layer=1, teacher_layer=1, view="plain"), (range(2), range(10, 12)))
    parts = [int(summed._part_BT(targets_of(1), row)[0, 0]) for row in (0, 1, 10, 11)]
    assert sorted(parts[::2]) == [0, 1] and parts[1::2] == [2, 2]


def head_of(weight_VD: Tensor) -> object:
    return lambda hidden_PD: hidden_PD @ weight_VD.T


PLACES = Places(
    positions_BM=torch.tensor([[0, 4], [2, 0], [1, 3], [6, 5]]),
    label_ids_BM=torch.zeros(4, 2, dtype=torch.int32),
    count_B=torch.tensor([2, 1, 2, 0]),
)
REAL = [(0, 0, 0), (0, 1, 4), (1, 0, 2), (2, 0, 1), (2, 1, 3)]
"""Row, place and position of every masked position."""


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_output_distributions(temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kept ids and one bucket for the rest of twelve; also where the logits are computed one by one."""
    monkeypatch.setattr("student_train.evaluate.fidelity.sums.LOGITS_AT_A_TIME", at_once)
    hidden_BTD, weight_VD = random(4, 7, 6, seed=4), random(12, 6, seed=5)
    log_p_BMV = (2 * random(4, 2, 12, seed=6)).log_softmax(-1)
    log_p_BMK, ids_BMK = log_p_BMV.topk(2)
    tail_BM = torch.log1p(-log_p_BMK.exp().sum(-1))
    logits = TopkLogits(ids_BMK=ids_BMK.int(), log_probs_BMK=log_p_BMK, log_tail_BM=tail_BM)
    summed = DistributionSum(12, temperature)
    summed.add(
        outputs_of(last_hidden_BTD=hidden_BTD, head=head_of(weight_VD)), targets_of(places=PLACES, logits=logits)
    )
    found = summed.result()
    kl, agreed = 0.0, 0
    for row, place, position in REAL:
        logits_V = (hidden_BTD[row, position] @ weight_VD.T).double()
        q_V, ids = (logits_V / temperature).softmax(0), ids_BMK[row, place]
        p_K = log_p_BMK[row, place].double().exp()
        p = torch.cat([p_K, 1 - p_K.sum(0, keepdim=True)])
        q = torch.cat([q_V[ids], 1 - q_V[ids].sum(0, keepdim=True)])
        kl += float((p * (p / q).log()).sum())
        agreed += int(logits_V.argmax() == ids[0])
    assert (found.positions, found.temperature) == (5, temperature)
    assert found.kl == pytest.approx(kl / 5, rel=1e-4) and found.top1_agreement == agreed / 5


def test_the_id_most_often_drawn_is_the_teachers_choice() -> None:
    """A head that names id 3 everywhere: where the teacher drew it most often they agree."""
    weight_VD = torch.zeros(5, 6)
    weight_VD[3] = 1
    ids_BMK = torch.tensor([1, 3, 4]).expand(4, 2, 3)
    counts_BMK = torch.tensor([[2, 5, 1], [5, 2, 1]]).expand(4, 2, 3)
    summed = DistributionSum(5, 1.0)
    summed.add(
        outputs_of(last_hidden_BTD=torch.ones(4, 7, 6), head=head_of(weight_VD)),
        targets_of(places=PLACES, logits=SampledLogits(ids_BMK=ids_BMK, counts_BMK=counts_BMK)),
    )
    # first places agree (three rows have one), second ones do not (two rows)
    assert summed.result().top1_agreement == pytest.approx(3 / 5)


def test_without_masked_positions_there_is_no_mean_of_nothing() -> None:
    assert DistributionSum(5, 1.0).result() is None
