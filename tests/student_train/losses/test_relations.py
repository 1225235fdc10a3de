"""The losses of attention against their formulas in float64, written with loops over rows and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from student_train.losses.relations import relation_loss, vectors_loss
from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.errors import SettingsError

LENGTHS = (7, 3, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def squares_by_loops(student_BTD: Tensor, teacher_BTD: Tensor, linear: nn.Linear) -> Tensor:
    """Sum over real positions of ||W s + b - t||^2 in float64, one position at a time."""
    weight_DE, bias_D = linear.weight.detach().double(), linear.bias.detach().double()
    errors = [
        weight_DE @ student_BTD[row, position].double() + bias_D - teacher_BTD[row, position].double()
        for row, length in enumerate(LENGTHS)
        for position in range(length)
    ]
    return torch.stack([error @ error for error in errors]).sum()


def test_vectors_loss_is_the_weighted_error_through_the_maps() -> None:
    student, teacher = attention(8, 10), attention(12, 20)
    names, weights, variances = ("query", "key", "value"), (1.0, 0.5, 3.0), (2.0, 5.0, 0.25)
    maps = nn.ModuleDict({name: nn.Linear(8, 12) for name in names})
    inputs = [getattr(student, f"{name}_BTD").requires_grad_() for name in names]
    real_BT = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    loss = vectors_loss(student, teacher, real_BT, dict(maps.items()), variances=variances, weights=weights)
    expected = sum(
        weight / variance * squares_by_loops(vectors_BTD, getattr(teacher, f"{name}_BTD"), maps[name])
        for name, vectors_BTD, weight, variance in zip(names, inputs, weights, variances, strict=True)
    )
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert int(loss.count) == sum(LENGTHS)
    gradients = zip(torch.autograd.grad(loss.total, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for found, wanted in gradients:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_vectors_loss_needs_no_map_of_what_weighs_nothing() -> None:
    student, teacher = attention(8, 10), attention(12, 20)
    maps = {"key": nn.Linear(8, 12)}
    real_BT = torch.ones(3, 7, dtype=torch.bool)
    loss = vectors_loss(student, teacher, real_BT, maps, variances=(1, 2, 1), weights=(0, 1, 0))
    error_BTD = maps["key"](student.key_BTD) - teacher.key_BTD
    torch.testing.assert_close(loss.total, error_BTD.square().sum() / 2)
