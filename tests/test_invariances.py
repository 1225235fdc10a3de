"""What must not change a loss: rotations inside a head, rotated targets, padding, and the order of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from student_train.kernels import relation_kl_sum
from student_train.losses.distributions import KeptTargets, SampledTargets, TopkTargets
from student_train.losses.hidden import (
    attended_state_loss,
    first_token_loss,
    hidden_state_loss,
    transport_costs,
    transported_state_loss,
)
from student_train.losses.relations import relation_loss, vectors_loss
from student_train.losses.sums import LossSum
from student_train.losses.vocabulary import LogitsTerm, projected_losses
from teacher_cache.contract.batch import AttentionVectors

LENGTHS = (9, 4, 1, 7)
POSITIONS, TEACHER, STUDENT, VOCABULARY = 9, 24, 16, 31
VECTORS = ("query", "key", "value")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(width, width, seed=seed).double())[0]


def vectors(states: list[Tensor]) -> AttentionVectors:
    return AttentionVectors(query_BTD=states[0], key_BTD=states[1], value_BTD=states[2])


def linear(seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(STUDENT, TEACHER)


def real_BT(length_B: Tensor) -> Tensor:
    return torch.arange(POSITIONS)[None, :] < length_B[:, None]


def relations(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    return relation_loss(vectors(student), vectors(teacher), length_B, heads=4, weights=(1, 0.5, 2))


def direct(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    maps = {name: linear(seed) for seed, name in enumerate(VECTORS)}
    return vectors_loss(
        vectors(student), vectors(teacher), real_BT(length_B), maps, variances=(2, 3, 4), weights=(1, 0.5, 2)
    )


def hidden(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    return hidden_state_loss(student[0], teacher[0], real_BT(length_B), linear(1), 3.0)


def first_token(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    return first_token_loss(student[0], teacher[0], linear(1))


def attended(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    return attended_state_loss(student[0], teacher, real_BT(length_B), linear(1), (1.0, 2.0, 0.5))


def transported(student: list[Tensor], teacher: list[Tensor], length_B: Tensor) -> LossSum:
    mapped, flow, deviations = (
        [linear(n)(state) for n, state in enumerate(student[:2])],
        [[0.2, 0.3, 0], [0.1, 0, 0.4]],
        (1.0, 2.0, 0.5),
    )
    costs_SL = transport_costs(mapped, teacher, real_BT(length_B), deviations)
    return transported_state_loss(mapped, teacher, real_BT(length_B), deviations, flow, costs_SL)


LOSSES = [relations, direct, hidden, first_token, attended, transported]
Loss = Callable[[list[Tensor], list[Tensor], Tensor], LossSum]


def states(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    shape = len(LENGTHS), POSITIONS
    return (
        [random(*shape, STUDENT, seed=seed + n) for n in range(3)],
        [random(*shape, TEACHER, seed=seed + 10 + n) for n in range(3)],
    )


def value_and_gradients(
    loss: Loss, student: list[Tensor], teacher: list[Tensor], length_B: Tensor
) -> tuple[float, int, list[Tensor]]:
    student = [state.clone().requires_grad_() for state in student]
    found = loss(student, teacher, length_B)
    gradients = torch.autograd.grad(found.total, student, allow_unused=True)
    filled = [torch.zeros_like(s) if g is None else g for s, g in zip(student, gradients, strict=True)]
    return float(found.total.detach()), int(found.count), filled


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", [0, 100])
def test_padding_changes_nothing(loss: Loss, seed: int) -> None:
    student, teacher = states(seed)
    length_B = torch.tensor(LENGTHS)
    padding = ~real_BT(length_B)
    expected = value_and_gradients(loss, student, teacher, length_B)
    for state in (*student, *teacher):
        state[padding] = 1e4 * random(int(padding.sum()), state.shape[2], seed=seed + 50)
    found = value_and_gradients(loss, student, teacher, length_B)
    assert found[:2] == expected[:2]
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert torch.equal(ours, theirs) and not ours[padding].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_a_batch_changes_nothing(loss: Loss) -> None:
    student, teacher = states(3)
    length_B, order = torch.tensor(LENGTHS), torch.tensor([2, 0, 3, 1])
    expected = value_and_gradients(loss, student, teacher, length_B)
    found = value_and_gradients(loss, [s[order] for s in student], [t[order] for t in teacher], length_B[order])
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and found[1] == expected[1]
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs[order], rtol=1e-5, atol=1e-6)
    # and each row costs what it costs alone; a loss over rows counts them, one over positions those
    alone = [
        loss([s[row : row + 1] for s in student], [t[row : row + 1] for t in teacher], length_B[row : row + 1])
        for row in range(4)
    ]
    assert sum(float(each.total.detach()) for each in alone) == pytest.approx(expected[0], rel=1e-5)
    assert sum(int(each.count) for each in alone) == expected[1]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_an_orthogonal_map_inside_a_head_changes_no_relation(side: str) -> None:
    teacher, student = (random(2, 3, 12, width, seed=width).double() for width in (6, 4))
    length_B = torch.tensor([12, 5])
    expected = relation_kl_sum(teacher, student, length_B)
    turned = {"teacher": teacher, "student": student}
    # another one for every head
    maps = torch.stack([orthogonal(turned[side].shape[-1], seed) for seed in range(3)])
    turned[side] = turned[side] @ maps
    found = relation_kl_sum(turned["teacher"], turned["student"], length_B)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    # not so across heads: the test can tell
    mixed = turned[side].flip(1).roll(1, dims=-1) if side == "teacher" else turned[side].flip(1)
    turned[side] = mixed
    assert not torch.isclose(relation_kl_sum(turned["teacher"], turned["student"], length_B), expected, rtol=1e-3)


def test_rotated_targets_with_a_rotated_projection_cost_the_same() -> None:
    """HS may stop at the cache's rotated coordinates: h -> (h - m) Q turns W, b into Q^T W, (b - m) Q."""
    student, teacher = (state[0].double() for state in states(5))
    length_B = torch.tensor(LENGTHS)
    rotation_DD, mean_D = orthogonal(TEACHER, 7), random(TEACHER, seed=8).double()
    plain, turned = linear(2).double(), linear(2).double()
    with torch.no_grad():
        turned.weight.copy_(rotation_DD.T @ plain.weight)
        turned.bias.copy_((plain.bias - mean_D) @ rotation_DD)
    results = []
    for projection, target in ((plain, teacher), (turned, (teacher - mean_D) @ rotation_DD)):
        state = student.clone().requires_grad_()
        loss = hidden_state_loss(state, target, real_BT(length_B), projection, 3.0)
        loss.total.backward()
        results.append((loss.total.detach(), state.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def places(form: str, real_P: Tensor, seed: int) -> Any:
    count = len(real_P)
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed + n))[:5] for n in range(count)]
    )
    log_probs_PK = (random(count, 6, seed=seed)).log_softmax(1)
    if form == "tail":
        return TopkTargets(ids, log_probs_PK[:, :5], log_probs_PK[:, 5], real_P)
    if form == "renormalise":
        return KeptTargets(ids, log_probs_PK[:, :5], real_P)
    counts = torch.randint(1, 9, (count, 5), generator=torch.Generator().manual_seed(seed))
    return SampledTargets(ids, counts, real_P)


@pytest.mark.parametrize("form", ["tail", "renormalise", "sample"])
def test_places_that_hold_no_masked_position_change_no_distribution_loss(form: str) -> None:
    hidden_PE, weight_VE = random(6, STUDENT, seed=1), random(VOCABULARY, STUDENT, seed=2)
    real_P = torch.tensor([True, True, False, True, False, True])

    def run(hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        hidden = hidden.clone().requires_grad_()
        (total,) = projected_losses(hidden, weight_VE, None, [LogitsTerm(targets, 2.0, 1.0)])
        return total.detach(), torch.autograd.grad(total, hidden)[0]

    targets = places(form, real_P, 3)
    expected = run(hidden_PE, targets)
    others = places(form, real_P, 40)
    swapped = type(targets)(
        *(torch.where(real_P if a.ndim == 1 else real_P[:, None], a, b) for a, b in zip(targets, others, strict=True))
    )
    garbage = torch.where(real_P[:, None], hidden_PE, 30 * random(6, STUDENT, seed=9))
    found = run(garbage, swapped)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert not found[1][~real_P].any()
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    permuted = run(hidden_PE[order], type(targets)(*(part[order] for part in targets)))
    torch.testing.assert_close(permuted[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(permuted[1], expected[1][order], rtol=1e-5, atol=1e-6)
