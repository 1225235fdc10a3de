"""Each loss against its formula in float64, written with loops over rows and positions, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train.losses.distributions import (
    KeptTargets,
    SampledTargets,
    TopkTargets,
    logits_loss,
    within_vocabulary,
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VOCABULARY = 23


def topk_of(logits_PV: Tensor, kept: int, temperature: float, real_P: Tensor | None = None) -> TopkTargets:
    log_probs_PV = (logits_PV.double() / temperature).log_softmax(1)
    log_probs_PK, ids_PK = log_probs_PV.topk(kept)
    others_PV = log_probs_PV.scatter(1, ids_PK, float("-inf"))
    if real_P is None:
        real_P = torch.ones(len(logits_PV), dtype=torch.bool)
    return TopkTargets(ids_PK.int(), log_probs_PK.float(), others_PV.logsumexp(1).float(), real_P)


def tail_loss_by_loops(logits_PV: Tensor, targets: TopkTargets, temperature: float) -> Tensor:
    """tau^2 [sum_K p log(p / q) + (1 - sum p) log((1 - sum p) / (1 - sum q))] over real positions, one at a time."""
    q_PV = (logits_PV.double() / temperature).softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        q_rest = torch.ones((), dtype=torch.float64)
        for id_, log_p in zip(targets.ids_PK[position], targets.log_probs_PK[position].double(), strict=True):
            q = q_PV[position, int(id_)]
            total = total + log_p.exp() * (log_p - q.log())
            q_rest = q_rest - q
        p_rest = targets.log_tail_P[position].double().exp()
        if p_rest > 0:
            total = total + p_rest * (p_rest.log() - q_rest.log())
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kept", [1, 6, VOCABULARY - 1])
def test_tail_loss_and_gradient(kept: int, temperature: float) -> None:
    real_P = torch.tensor([True, True, False, True])
    targets = topk_of(random(4, VOCABULARY, scale=2), kept, temperature, real_P)
    student = random(4, VOCABULARY, seed=1, scale=2)
    plain = student.double().requires_grad_()
    expected = tail_loss_by_loops(plain, targets, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    student.requires_grad_()
    found = logits_loss(student, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[2].any()


@pytest.mark.parametrize("kept", [1, 6, VOCABULARY - 1])
def test_gradient_to_the_last_digits(kept: int) -> None:
    targets = topk_of(random(4, VOCABULARY, scale=2), kept, 1.5, torch.tensor([True, False, True, True]))
    student = random(4, VOCABULARY, seed=1, scale=2).double().requires_grad_()
    (expected,) = torch.autograd.grad(tail_loss_by_loops(student, targets, 1.5), student)
    (found,) = torch.autograd.grad(3 * logits_loss(student, targets, temperature=1.5), student)
    torch.testing.assert_close(found, 3 * expected, rtol=1e-8, atol=1e-12)


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient() -> None:
    student = random(3, VOCABULARY).requires_grad_()
    loss = logits_loss(student, topk_of(random(3, VOCABULARY, seed=1), 4, 1.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_logits_stay_as_they_were() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = random(3, VOCABULARY).to(dtype).requires_grad_()
        before = student.detach().clone()
        logits_loss(student, topk_of(random(3, VOCABULARY, seed=1), 4, 2.0), temperature=2.0).backward()
        assert torch.equal(student, before) and student.grad is not None and student.grad.dtype == dtype


def test_everything_kept_is_the_full_divergence() -> None:
    teacher, student = random(4, VOCABULARY, scale=2), random(4, VOCABULARY, seed=1).requires_grad_()
    targets = topk_of(teacher, VOCABULARY, 1.0)
    assert torch.isneginf(targets.log_tail_P).all()
    found = logits_loss(student, targets)
    p, q = teacher.double().log_softmax(1), student.double().log_softmax(1)
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()


def test_tail_of_zero_mass_adds_nothing_and_no_nan() -> None:
    student = random(2, VOCABULARY).requires_grad_()
    log_probs_PK = torch.tensor([[0.0, float("-inf")], [-0.5, -0.9327521]])
    targets = TopkTargets(
        torch.tensor([[3, 4], [5, 6]]), log_probs_PK, torch.full((2,), float("-inf")), torch.tensor([True, True])
    )
    found = logits_loss(student, targets)
    log_q = student.double().log_softmax(1)
    expected = -log_q[0, 3] + sum(
        p.exp() * (p - log_q[1, i]) for p, i in zip(log_probs_PK[1].double(), (5, 6), strict=True)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()


def test_a_student_sure_of_the_kept_entries_has_an_exact_tail() -> None:
    """The student's tail mass is exp(-60): 1 - sum q would be 0 in float64 already."""
    student = torch.zeros(1, VOCABULARY)
    student[0, 2] = 60.0
    targets = TopkTargets(
        torch.tensor([[2]]), torch.tensor([[math.log(0.75)]]), torch.tensor([math.log(0.25)]), torch.tensor([True])
    )
    student.requires_grad_()
    found = logits_loss(student, targets)
    expected = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - (math.log(VOCABULARY - 1) - 60))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient[0, 2], torch.tensor(0.25), rtol=1e-5, atol=0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(scale: float) -> None:
    student = (scale * random(4, VOCABULARY)).requires_grad_()
    found = logits_loss(student, topk_of(random(4, VOCABULARY, seed=1), 3, 1.0))
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(found) and torch.isfinite(gradient).all()


def test_places_that_are_not_real_may_hold_anything() -> None:
    student = random(3, VOCABULARY).requires_grad_()
    good = topk_of(random(3, VOCABULARY, seed=1), 4, 1.0)
    real_P = torch.tensor([True, False, True])
    ids, log_probs, log_tail = (part.clone() for part in good[:3])
    ids[1], log_probs[1], log_tail[1] = 0, float("nan"), float("nan")
    found = logits_loss(student, TopkTargets(ids, log_probs, log_tail, real_P))
    expected = tail_loss_by_loops(student.detach(), good._replace(real_P=real_P), 1.0)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all() and not gradient[1].any()


def draws_of(logits_PV: Tensor, draws: int, temperature: float, real_P: Tensor, seed: int = 0) -> SampledTargets:
    """Independent draws as distinct ascending ids with counts, filled up with the last id and count 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn_PN = (logits_PV.double() / temperature).softmax(1).multinomial(draws, replacement=True, generator=generator)
    ids_PN, counts_PN = torch.zeros_like(drawn_PN), torch.zeros_like(drawn_PN, dtype=torch.int32)
    for position in range(len(logits_PV)):
        ids, counts = drawn_PN[position].unique(return_counts=True)
        ids_PN[position] = ids[-1]
        ids_PN[position, : len(ids)], counts_PN[position, : len(ids)] = ids, counts.int()
    counts_PN[~real_P] = 0
    return SampledTargets(ids_PN, counts_PN, real_P)


def sampled_loss_by_loops(logits_PV: Tensor, targets: SampledTargets, temperature: float) -> Tensor:
    """tau^2 sum_K c/N (log(c/N) - log q) over real positions, one at a time."""
    log_q_PV = (logits_PV.double() / temperature).log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        draws = int(targets.counts_PK[position].sum())
        for id_, count in zip(targets.ids_PK[position], targets.counts_PK[position], strict=True):
            if count:
                share = int(count) / draws
                total = total + share * (math.log(share) - log_q_PV[position, int(id_)])
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("draws", [1, 12])
def test_sampled_loss_and_gradient(draws: int, temperature: float) -> None:
    real_P = torch.tensor([True, True, False, True])
    targets = draws_of(random(4, VOCABULARY, scale=2), draws, temperature, real_P)
    student = random(4, VOCABULARY, seed=1, scale=2)
    plain = student.double().requires_grad_()
    expected = sampled_loss_by_loops(plain, targets, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    student.requires_grad_()
    found = logits_loss(student, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[2].any()
    in_float64 = student.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(3 * logits_loss(in_float64, targets, temperature=temperature), in_float64)
    torch.testing.assert_close(gradient, 3 * expected_gradient, rtol=1e-8, atol=1e-12)


def test_sampled_gradient_is_that_of_the_full_distribution_on_average() -> None:
    temperature, repetitions, draws = 1.5, 4000, 10
    teacher, student = random(3, VOCABULARY, scale=2), random(3, VOCABULARY, seed=1, scale=2).double().requires_grad_()
    p, log_q = (teacher.double() / temperature).softmax(1), (student / temperature).log_softmax(1)
    (expected,) = torch.autograd.grad(temperature**2 * (p * (p.log() - log_q)).sum(), student)
    many = draws_of(teacher.repeat(repetitions, 1), draws, temperature, torch.ones(3 * repetitions, dtype=torch.bool))
    repeated = student.detach().repeat(repetitions, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(logits_loss(repeated, many, temperature=temperature), repeated)
    deviation = temperature * (p * (1 - p) / (draws * repetitions)).sqrt()
    assert bool(((gradient.view(repetitions, 3, -1).mean(0) - expected).abs() < 5 * deviation).all())


def test_a_position_without_draws_adds_nothing() -> None:
    student = random(2, VOCABULARY).requires_grad_()
    empty = SampledTargets(
        torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int32), torch.ones(2).bool()
    )
    found = logits_loss(student, empty)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == 0 and not gradient.any()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite_with_samples(scale: float) -> None:
    student = (scale * random(4, VOCABULARY)).requires_grad_()
    targets = draws_of(random(4, VOCABULARY, seed=1), 9, 1.0, torch.ones(4, dtype=torch.bool))
    found = logits_loss(student, targets)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(found) and torch.isfinite(gradient).all()


def test_samples_leave_the_logits_as_they_were_and_refuse_a_second_backward_pass() -> None:
    targets = draws_of(random(3, VOCABULARY, seed=1), 9, 2.0, torch.ones(3, dtype=torch.bool))
    for dtype in (torch.float32, torch.bfloat16):
        student = random(3, VOCABULARY).to(dtype).requires_grad_()
        before = student.detach().clone()
        loss = logits_loss(student, targets, temperature=2.0)
        loss.backward(retain_graph=True)
        assert torch.equal(student, before) and student.grad is not None and student.grad.dtype == dtype
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def renormalised_loss_by_loops(logits_PV: Tensor, targets: KeptTargets, temperature: float) -> Tensor:
    """tau^2 sum_K p log(p / q), both divided by their sums over the kept ids, at real positions, one at a time."""
    q_PV = (logits_PV.double() / temperature).softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        ids, p = targets.ids_PK[position].tolist(), targets.log_probs_PK[position].double().exp()
        q_sum = torch.stack([q_PV[position, id_] for id_ in ids]).sum()
        for id_, share in zip(ids, p / p.sum(), strict=True):
            if share > 0:
                total = total + share * (share.log() - (q_PV[position, id_] / q_sum).log())
    return temperature**2 * total


def kept_of(logits_PV: Tensor, kept: int, temperature: float, real_P: Tensor | None = None) -> KeptTargets:
    topk = topk_of(logits_PV, kept, temperature, real_P)
    return KeptTargets(topk.ids_PK, topk.log_probs_PK, topk.real_P)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kept", [2, 6, VOCABULARY])
def test_renormalised_loss_and_gradient(kept: int, temperature: float) -> None:
    targets = kept_of(random(4, VOCABULARY, scale=2), kept, temperature, torch.tensor([True, True, False, True]))
    plain = random(4, VOCABULARY, seed=1, scale=2).double().requires_grad_()
    expected = renormalised_loss_by_loops(plain, targets, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    student = plain.detach().float().requires_grad_()
    found = logits_loss(student, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[2].any()
    in_float64 = plain.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(3 * logits_loss(in_float64, targets, temperature=temperature), in_float64)
    torch.testing.assert_close(gradient, 3 * expected_gradient, rtol=1e-8, atol=1e-12)


def test_renormalised_the_other_logits_do_not_count_and_one_id_teaches_nothing() -> None:
    targets = kept_of(random(3, VOCABULARY, scale=2), 4, 1.0)
    student = random(3, VOCABULARY, seed=1)
    raised = student + 50 * torch.ones_like(student).scatter(1, targets.ids_PK.long(), 0.0)
    torch.testing.assert_close(logits_loss(raised, targets), logits_loss(student, targets))
    assert logits_loss(student, kept_of(random(3, VOCABULARY), 1, 1.0)).item() == 0


def test_renormalised_without_mass_or_at_places_that_are_not_real_there_is_no_gradient() -> None:
    student = random(3, VOCABULARY).requires_grad_()
    good = kept_of(random(3, VOCABULARY, seed=1), 4, 1.0)
    log_probs = good.log_probs_PK.clone()
    log_probs[1], log_probs[2] = float("nan"), float("-inf")
    targets = KeptTargets(good.ids_PK, log_probs, torch.tensor([True, False, True]))
    found = logits_loss(student, targets)
    expected = renormalised_loss_by_loops(student, good._replace(real_P=torch.tensor([True, False, False])), 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all() and gradient[0].any() and not gradient[1:].any()


# ---- ids that the student has not got -------------------------------------------------------------------------------

SMALLER = VOCABULARY - 9


def kept_by_loops(logits_PV: Tensor, targets: TopkTargets, temperature: float) -> Tensor:
    """KL over what the student has of the kept ids and one bucket for all else, theirs or its own."""
    q_PV = (logits_PV.double() / temperature).softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        pairs = list(zip(targets.ids_PK[position].tolist(), targets.log_probs_PK[position].double().exp(), strict=True))
        given = [(id_, p) for id_, p in pairs if id_ < logits_PV.shape[1]]
        if not given:
            continue
        p_rest = targets.log_tail_P[position].double().exp() + sum(p for id_, p in pairs if id_ >= logits_PV.shape[1])
        q_rest = 1 - sum(q_PV[position, id_] for id_, _ in given)
        total = total + sum(p * (p / q_PV[position, id_]).log() for id_, p in given)
        total = total + p_rest * (p_rest / q_rest).log()
    return temperature**2 * total


def renormalised_by_loops(logits_PV: Tensor, targets: KeptTargets, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        given = [place for place, id_ in enumerate(targets.ids_PK[position].tolist()) if id_ < logits_PV.shape[1]]
        if given:
            q_K = (logits_PV[position].double() / temperature)[targets.ids_PK[position, given].long()].softmax(0)
            p_K = targets.log_probs_PK[position, given].double().softmax(0)
            total = total + (p_K * (p_K / q_K).log()).sum()
    return temperature**2 * total


def sampled_by_loops(logits_PV: Tensor, targets: SampledTargets, temperature: float) -> Tensor:
    log_q_PV = (logits_PV.double() / temperature).log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for position in torch.nonzero(targets.real_P).flatten().tolist():
        pairs = zip(targets.ids_PK[position].tolist(), targets.counts_PK[position].tolist(), strict=True)
        given = [(id_, count) for id_, count in pairs if id_ < logits_PV.shape[1] and count]
        draws = sum(count for _, count in given)
        for id_, count in given:
            total = total + count / draws * (math.log(count / draws) - log_q_PV[position, id_])
    return temperature**2 * total


def beyond(form: str, temperature: float) -> TopkTargets | KeptTargets | SampledTargets:
    """Targets of 6 positions over 23 ids: some beyond a student of 14; one position all of them, one none, one no real.

    The ids of the student's at the first position come after the others.
    """
    logits_PV = random(6, VOCABULARY, scale=2)
    logits_PV[0, SMALLER:] += 1
    logits_PV[1, SMALLER:] += 50
    logits_PV[2, SMALLER:] -= 50
    real_P = torch.tensor([True, True, True, True, False, True])
    topk = topk_of(logits_PV, 6, temperature, real_P)
    if form == "tail":
        return topk
    if form == "renormalise":
        return KeptTargets(topk.ids_PK, topk.log_probs_PK, real_P)
    counts_PK = torch.tensor([3, 2, 2, 1, 1, 0]).expand(6, 6)
    return SampledTargets(topk.ids_PK, counts_PK, real_P)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("form", "formula"),
    [("tail", kept_by_loops), ("renormalise", renormalised_by_loops), ("sample", sampled_by_loops)],
)
def test_ids_beyond_the_students_vocabulary(form: str, formula: Any, temperature: float) -> None:
    targets = beyond(form, temperature)
    assert int((targets.ids_PK[0] >= SMALLER).sum()) in range(1, 6)
    student = random(6, SMALLER, seed=1, scale=2)
    plain = student.double().requires_grad_()
    expected = formula(plain, targets, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    cut = within_vocabulary(targets, SMALLER)
    assert cut.real_P.tolist() == [True, False, True, True, False, True]
    student.requires_grad_()
    found = logits_loss(student, cut, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[[1, 4]].any()


@pytest.mark.parametrize("form", ["tail", "renormalise", "sample"])
def test_where_the_student_has_all_ids_nothing_changes(form: str) -> None:
    targets = beyond(form, 1.0)
    found = within_vocabulary(targets, VOCABULARY)
    assert all(torch.equal(one, other) for one, other in zip(found, targets, strict=True))
