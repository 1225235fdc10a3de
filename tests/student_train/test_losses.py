"""Each loss against its formula in float64, written with loops over rows and positions, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from student_train.losses import (
    SampledTargets,
    TopkTargets,
    distribution_loss,
    distribution_sampled_loss,
    distribution_tail_loss,
    hidden_state_loss,
    relation_loss,
)
from teacher_cache.batch import AttentionVectors
from teacher_cache.errors import SettingsError

LENGTHS = (7, 3, 1)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real(positions: int = 7) -> Tensor:
    return torch.arange(positions)[None, :] < torch.tensor(LENGTHS)[:, None]


# ---- hidden states --------------------------------------------------------------------------------------------------


def test_hidden_state_loss_is_the_normalised_error_of_real_positions() -> None:
    student, teacher = random(3, 7, 5), random(3, 7, 8, seed=1)
    teacher[~real()] = float("nan")  # padding must not enter at all
    projection = nn.Linear(5, 8)
    expected = 0.0
    for row, length in enumerate(LENGTHS):
        for i in range(length):
            mapped = projection.weight.double() @ student[row, i].double() + projection.bias.double()
            expected += ((mapped - teacher[row, i].double()) ** 2).sum().item() / 3.5
    loss = hidden_state_loss(student, teacher, real(), projection, 3.5)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert int(loss.count) == sum(LENGTHS)


def test_hidden_state_loss_is_one_per_position_for_the_best_constant() -> None:
    teacher = random(3, 7, 8)
    flat = teacher[real()]
    variance = float((flat - flat.mean(0)).square().sum(1).mean())
    constant = nn.Linear(5, 8)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(flat.mean(0))
    loss = hidden_state_loss(random(3, 7, 5), teacher, real(), constant, variance)
    assert (loss.total / loss.count).item() == pytest.approx(1, rel=1e-5)


def test_hidden_state_loss_ignores_padding_in_its_gradient() -> None:
    student = random(3, 7, 5).requires_grad_()
    hidden_state_loss(student, random(3, 7, 8, seed=1), real(), nn.Linear(5, 8), 1.0).total.backward()
    assert student.grad is not None
    assert student.grad[real()].abs().min() > 0 and not student.grad[~real()].any()


# ---- relations ------------------------------------------------------------------------------------------------------


def attention(width: int, seed: int) -> AttentionVectors:
    query, key, value = (random(3, 7, width, seed=seed + n) for n in range(3))
    return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)


def relation_by_loops(teacher_BTD: Tensor, student_BTD: Tensor, heads: int) -> float:
    """Sum over real positions of the mean over heads of KL, one head of one row at a time."""
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for head in range(heads):
            logs = []
            for vectors_BTD in (teacher_BTD, student_BTD):
                width = vectors_BTD.shape[2] // heads
                x_Td = vectors_BTD[row, :length, head * width : (head + 1) * width].double()
                logs.append((x_Td @ x_Td.T / math.sqrt(width)).log_softmax(1))
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum()) / heads
    return total


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relation_loss_weighs_query_key_and_value(heads: int) -> None:
    student, teacher, weights = attention(8, 10), attention(12, 20), (1.0, 0.5, 3.0)
    loss = relation_loss(student, teacher, torch.tensor(LENGTHS), heads=heads, weights=weights)
    names = ("query_BTD", "key_BTD", "value_BTD")
    expected = sum(
        weight * relation_by_loops(getattr(teacher, name), getattr(student, name), heads)
        for name, weight in zip(names, weights, strict=True)
    )
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert int(loss.count) == sum(LENGTHS)


def test_relation_loss_leaves_out_what_weighs_nothing() -> None:
    student = attention(8, 10)
    for vectors in (student.query_BTD, student.key_BTD, student.value_BTD):
        vectors.requires_grad_()
    loss = relation_loss(student, attention(12, 20), torch.tensor(LENGTHS), heads=2, weights=(0, 1, 0))
    loss.total.backward()
    assert student.query_BTD.grad is None and student.value_BTD.grad is None and student.key_BTD.grad is not None


def test_relation_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 relation heads do not divide the width 8"):
        relation_loss(attention(8, 10), attention(12, 20), torch.tensor(LENGTHS), heads=3, weights=(1, 1, 1))


# ---- distribution ---------------------------------------------------------------------------------------------------

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
    found = distribution_tail_loss(student, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[2].any()


@pytest.mark.parametrize("kept", [1, 6, VOCABULARY - 1])
def test_gradient_to_the_last_digits(kept: int) -> None:
    targets = topk_of(random(4, VOCABULARY, scale=2), kept, 1.5, torch.tensor([True, False, True, True]))
    student = random(4, VOCABULARY, seed=1, scale=2).double().requires_grad_()
    (expected,) = torch.autograd.grad(tail_loss_by_loops(student, targets, 1.5), student)
    (found,) = torch.autograd.grad(3 * distribution_tail_loss(student, targets, temperature=1.5), student)
    torch.testing.assert_close(found, 3 * expected, rtol=1e-8, atol=1e-12)


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient() -> None:
    student = random(3, VOCABULARY).requires_grad_()
    loss = distribution_tail_loss(student, topk_of(random(3, VOCABULARY, seed=1), 4, 1.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_logits_stay_as_they_were() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = random(3, VOCABULARY).to(dtype).requires_grad_()
        before = student.detach().clone()
        distribution_tail_loss(student, topk_of(random(3, VOCABULARY, seed=1), 4, 2.0), temperature=2.0).backward()
        assert torch.equal(student, before) and student.grad is not None and student.grad.dtype == dtype


def test_everything_kept_is_the_full_divergence() -> None:
    teacher, student = random(4, VOCABULARY, scale=2), random(4, VOCABULARY, seed=1).requires_grad_()
    targets = topk_of(teacher, VOCABULARY, 1.0)
    assert torch.isneginf(targets.log_tail_P).all()
    found = distribution_tail_loss(student, targets)
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
    found = distribution_tail_loss(student, targets)
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
    found = distribution_tail_loss(student, targets)
    expected = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - (math.log(VOCABULARY - 1) - 60))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient[0, 2], torch.tensor(0.25), rtol=1e-5, atol=0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(scale: float) -> None:
    student = (scale * random(4, VOCABULARY)).requires_grad_()
    found = distribution_tail_loss(student, topk_of(random(4, VOCABULARY, seed=1), 3, 1.0))
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(found) and torch.isfinite(gradient).all()


def test_places_that_are_not_real_may_hold_anything() -> None:
    student = random(3, VOCABULARY).requires_grad_()
    good = topk_of(random(3, VOCABULARY, seed=1), 4, 1.0)
    real_P = torch.tensor([True, False, True])
    ids, log_probs, log_tail = (part.clone() for part in good[:3])
    ids[1], log_probs[1], log_tail[1] = 0, float("nan"), float("nan")
    found = distribution_tail_loss(student, TopkTargets(ids, log_probs, log_tail, real_P))
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
    found = distribution_sampled_loss(student, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[2].any()
    in_float64 = student.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(
        3 * distribution_sampled_loss(in_float64, targets, temperature=temperature), in_float64
    )
    torch.testing.assert_close(gradient, 3 * expected_gradient, rtol=1e-8, atol=1e-12)


def test_sampled_gradient_is_that_of_the_full_distribution_on_average() -> None:
    temperature, repetitions, draws = 1.5, 4000, 10
    teacher, student = random(3, VOCABULARY, scale=2), random(3, VOCABULARY, seed=1, scale=2).double().requires_grad_()
    p, log_q = (teacher.double() / temperature).softmax(1), (student / temperature).log_softmax(1)
    (expected,) = torch.autograd.grad(temperature**2 * (p * (p.log() - log_q)).sum(), student)
    many = draws_of(teacher.repeat(repetitions, 1), draws, temperature, torch.ones(3 * repetitions, dtype=torch.bool))
    repeated = student.detach().repeat(repetitions, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(distribution_sampled_loss(repeated, many, temperature=temperature), repeated)
    deviation = temperature * (p * (1 - p) / (draws * repetitions)).sqrt()
    assert bool(((gradient.view(repetitions, 3, -1).mean(0) - expected).abs() < 5 * deviation).all())


def test_a_position_without_draws_adds_nothing() -> None:
    student = random(2, VOCABULARY).requires_grad_()
    empty = SampledTargets(
        torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int32), torch.ones(2).bool()
    )
    found = distribution_sampled_loss(student, empty)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == 0 and not gradient.any()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite_with_samples(scale: float) -> None:
    student = (scale * random(4, VOCABULARY)).requires_grad_()
    targets = draws_of(random(4, VOCABULARY, seed=1), 9, 1.0, torch.ones(4, dtype=torch.bool))
    found = distribution_sampled_loss(student, targets)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(found) and torch.isfinite(gradient).all()


def test_samples_leave_the_logits_as_they_were_and_refuse_a_second_backward_pass() -> None:
    targets = draws_of(random(3, VOCABULARY, seed=1), 9, 2.0, torch.ones(3, dtype=torch.bool))
    for dtype in (torch.float32, torch.bfloat16):
        student = random(3, VOCABULARY).to(dtype).requires_grad_()
        before = student.detach().clone()
        loss = distribution_sampled_loss(student, targets, temperature=2.0)
        loss.backward(retain_graph=True)
        assert torch.equal(student, before) and student.grad is not None and student.grad.dtype == dtype
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class CountingHead(nn.Module):
    """A linear head that notes how many positions it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(6, VOCABULARY)
        self.seen: list[int] = []

    def forward(self, hidden_PD: Tensor) -> Tensor:
        self.seen.append(len(hidden_PD))
        logits_PV: Tensor = self.decoder(hidden_PD)
        return logits_PV


def topk_targets() -> TopkTargets:
    return topk_of(random(11, VOCABULARY, seed=1), 5, 1.0, torch.arange(11) < 9)


def sampled_targets() -> SampledTargets:
    return draws_of(random(11, VOCABULARY, seed=1), 20, 1.0, torch.arange(11) < 9)


def loss_with_gradients(
    targets: TopkTargets | SampledTargets, logits_at_a_time: int
) -> tuple[list[int], Tensor, list[Tensor]]:
    torch.manual_seed(3)
    head, hidden_PD = CountingHead(), random(11, 6).requires_grad_()
    loss = distribution_loss(
        head, hidden_PD, targets, vocab_size=VOCABULARY, temperature=1.0, logits_at_a_time=logits_at_a_time
    )
    assert int(loss.count) == 9
    gradients = torch.autograd.grad(loss.total, [hidden_PD, *head.parameters()])
    return head.seen, loss.total.detach(), list(gradients)


@pytest.mark.parametrize("make_targets", [topk_targets, sampled_targets])
def test_runs_of_positions_add_up_to_the_whole(make_targets: Callable[[], TopkTargets | SampledTargets]) -> None:
    targets = make_targets()
    seen, total, gradients = loss_with_gradients(targets, 1 << 20)
    assert seen == [11]
    seen_in_runs, total_of_runs, gradients_of_runs = loss_with_gradients(targets, 4 * VOCABULARY + 1)
    # three runs forward; backward computes each again and keeps none before
    assert sorted(seen_in_runs[:3]) == [3, 4, 4] and len(seen_in_runs) == 6
    torch.testing.assert_close(total_of_runs, total, rtol=1e-6, atol=0)
    for in_runs, whole in zip(gradients_of_runs, gradients, strict=True):
        torch.testing.assert_close(in_runs, whole, rtol=1e-5, atol=1e-6)
    assert loss_with_gradients(targets, 1)[0] == [1] * 22


def largest_tensor(function: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation inside returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        function()
    return largest


def topk_of_250002(positions: int) -> TopkTargets:
    return TopkTargets(
        torch.arange(8).repeat(positions, 1) + 250_002 - 8,
        torch.full((positions, 8), math.log(0.1)),
        torch.full((positions,), math.log(0.2)),
        torch.ones(positions, dtype=torch.bool),
    )


def sampled_of_250002(positions: int) -> SampledTargets:
    return SampledTargets(
        torch.arange(8).repeat(positions, 1) + 250_002 - 8,
        torch.ones(positions, 8, dtype=torch.int32),
        torch.ones(positions, dtype=torch.bool),
    )


@pytest.mark.parametrize("make_targets", [topk_of_250002, sampled_of_250002])
def test_a_vocabulary_of_250002_never_makes_all_logits(
    make_targets: Callable[[int], TopkTargets | SampledTargets],
) -> None:
    vocabulary, positions, width = 250_002, 40, 4
    decoder = nn.Linear(width, vocabulary)
    hidden_PD = random(positions, width).requires_grad_()
    targets, at_a_time = make_targets(positions), 8 * vocabulary

    def step() -> None:
        loss = distribution_loss(
            decoder, hidden_PD, targets, vocab_size=vocabulary, temperature=1.0, logits_at_a_time=at_a_time
        )
        loss.total.backward()

    assert largest_tensor(step) == at_a_time
    assert decoder.weight.grad is not None and decoder.weight.grad[-8:].abs().min() > 0
