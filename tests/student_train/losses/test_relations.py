"""The losses of attention against their formulas in float64, written with loops over rows and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.relations import relation_loss
from teacher_cache.batch import AttentionVectors
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
