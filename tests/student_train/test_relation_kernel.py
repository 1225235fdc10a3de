"""The relation kernels against the published formula in float64, written with loops over rows, heads and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train.kernels import relation
from student_train.kernels.relation import (
    chunked_kl,
    reference_kl,
    relation_kl,
    relation_kl_sum,
    stored_relation_kl_sum,
)
from teacher_cache.relations import relation_matrices

RAGGED = (9, 1, 6)


def kl_by_loops(teacher_BATd: Tensor, student_BATd: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """KL_i as [B, A, T] in float64, 0 at padding: one softmax at a time."""
    batch, heads, positions, _ = student_BATd.shape
    teacher_BATd, student_BATd = teacher_BATd.double(), student_BATd.double()
    rows = torch.zeros(batch, heads, positions, dtype=torch.float64)
    for b in range(batch):
        for a in range(heads):
            for i in range(lengths[b]):
                logs = []
                for vectors_Td in (teacher_BATd[b, a, : lengths[b]], student_BATd[b, a, : lengths[b]]):
                    logits_T = torch.stack([vectors_Td[i] @ vectors_Td[j] for j in range(lengths[b])])
                    logs.append((logits_T / math.sqrt(vectors_Td.shape[1])).log_softmax(0))
                rows[b, a, i] = (logs[0].exp() * (logs[0] - logs[1])).sum()
    return rows


def vectors(
    *,
    batch: int = 3,
    heads: int = 2,
    positions: int = 9,
    teacher_width: int = 8,
    student_width: int = 5,
    scale: float = 1.5,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    teacher = scale * torch.randn(batch, heads, positions, teacher_width, generator=generator, dtype=torch.float64)
    student = scale * torch.randn(batch, heads, positions, student_width, generator=generator, dtype=torch.float64)
    return teacher, student


def value_and_gradient(
    function: Any, teacher: Tensor, student: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = function(teacher, student, *args, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def test_matrices_in_place_of_the_teachers_vectors() -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    real_BT = torch.arange(9) < length_B[:, None]
    stacked_BTD = teacher.transpose(1, 2).flatten(2)
    matrices_BATT = relation_matrices(stacked_BTD, 2, real_BT)
    value, gradient = value_and_gradient(stored_relation_kl_sum, matrices_BATT.double(), student, length_B)
    want, want_gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert relative_error(gradient, want_gradient) < 1e-5
    halved, _ = value_and_gradient(stored_relation_kl_sum, matrices_BATT.half(), student, length_B)
    assert float(halved) == pytest.approx(float(want), rel=1e-3)
    # a distribution compared with itself, rounded: never below zero
    assert float(stored_relation_kl_sum(matrices_BATT.half(), teacher, length_B)) >= 0


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_sum_and_mean_over_heads_and_real_positions(backend: Any) -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    expected = kl_by_loops(teacher, student, RAGGED).sum() / 2
    assert expected > 1
    total = relation_kl_sum(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    mean = relation_kl(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(mean, expected / sum(RAGGED), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradient_of_the_loops(backend: Any) -> None:
    teacher, student = vectors()
    _, expected = value_and_gradient(kl_by_loops, teacher, student, RAGGED)
    _, found = value_and_gradient(relation_kl_sum, teacher, student, torch.tensor(RAGGED), backend=backend)
    torch.testing.assert_close(found, expected / 2, rtol=1e-10, atol=1e-13)
    assert not found[1, :, 1:].any()


# tiles: one logit (so one row of one matrix), rows that do not divide T, several matrices at once, everything
@pytest.mark.parametrize("tile_elements", [1, 9 * 4, 9 * 9 * 4, 1 << 20])
def test_every_tiling_gives_the_same_rows(tile_elements: int) -> None:
    teacher, student = vectors()
    for length_B in (None, torch.tensor(RAGGED)):
        lengths = RAGGED if length_B is not None else (9, 9, 9)
        rows, gradient = value_and_gradient(chunked_kl, teacher, student, length_B, tile_elements=tile_elements)
        expected, expected_gradient = value_and_gradient(kl_by_loops, teacher, student, lengths)
        torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile_elements", [7 * 2, 1 << 20])
def test_gradcheck_with_a_different_weight_on_every_position(tile_elements: int) -> None:
    teacher, student = vectors(batch=2, positions=7)
    length_B = torch.tensor([7, 4])
    weights_BAT = torch.rand(2, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(student: Tensor) -> Tensor:
        return (weights_BAT * chunked_kl(teacher, student, length_B, tile_elements=tile_elements)).sum()

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize(("teacher_width", "student_width"), [(4, 128), (16, 12), (64, 32), (128, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)],
)
def test_accuracy_by_width_and_type(
    teacher_width: int, student_width: int, dtype: torch.dtype, tolerance: float
) -> None:
    teacher, student = vectors(positions=37, teacher_width=teacher_width, student_width=student_width, scale=0.8)
    teacher, student = teacher.to(dtype), student.to(dtype)
    length_B = torch.tensor([37, 5, 20])
    # the same rounded inputs in float64, so that only arithmetic is judged
    expected, expected_gradient = value_and_gradient(reference_kl, teacher.double(), student.double(), length_B)
    for tile_elements in (37 * 5, 1 << 20):
        rows, gradient = value_and_gradient(chunked_kl, teacher, student, length_B, tile_elements=tile_elements)
        assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        assert relative_error(rows, expected) <= min(tolerance, 1e-5)
        # a half-precision gradient is rounded once, at the end
        assert relative_error(gradient, expected_gradient) <= tolerance


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_right(backend: Any, dtype: torch.dtype) -> None:
    teacher, student = vectors(positions=11, teacher_width=16, student_width=16, scale=1.0)
    largest = max(float((v @ v.transpose(-1, -2)).abs().max()) / 4 for v in (teacher, student))
    teacher, student = (v * math.sqrt(1e4 / largest) for v in (teacher, student))
    # padding holds anything, here numbers that would overflow if they entered
    for v in (teacher, student):
        v[1, :, 6:] *= 100
    teacher, student = teacher.to(dtype), student.to(dtype)
    length_B = torch.tensor([11, 6, 11])
    rows_expected = kl_by_loops(teacher, student, (11, 6, 11))
    value, gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B, backend=backend)
    assert torch.isfinite(gradient).all()
    assert not gradient[1, :, 6:].any()
    torch.testing.assert_close(value.double(), rows_expected.sum() / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equal_vectors_cost_nothing_even_at_large_logits(backend: Any) -> None:
    teacher, _ = vectors(teacher_width=16, scale=40.0)
    teacher = teacher.float()
    value, gradient = value_and_gradient(relation_kl_sum, teacher, teacher.clone(), None, backend=backend)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-5


def test_empty_rows_count_nothing() -> None:
    teacher, student = vectors()
    for backend in ("reference", "chunked"):
        length_B = torch.tensor([9, 0, 6])
        value, gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B, backend=backend)
        expected = kl_by_loops(teacher, student, (9, 0, 6)).sum() / 2
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        assert torch.isfinite(gradient).all() and not gradient[1].any()


def test_only_the_student_gets_a_gradient() -> None:
    for backend in ("reference", "chunked"):
        teacher, student = (v.requires_grad_() for v in vectors())
        relation_kl_sum(teacher, student, torch.tensor(RAGGED), backend=backend).backward()
        assert teacher.grad is None and student.grad is not None


def test_repeats_exactly() -> None:
    teacher, student = vectors(positions=65)
    first, second = (
        value_and_gradient(chunked_kl, teacher.float(), student.float(), None, tile_elements=65 * 7) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_chunked_keeps_no_relation_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = vectors(batch=1, heads=1, positions=257, teacher_width=4, student_width=4)
    student.requires_grad_()
    kept: list[Tensor] = []
    created: list[int] = []
    original = relation._logits

    def logits(*args: Any) -> Tensor:
        tile = original(*args)
        created.append(tile.numel())
        return tile

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(relation, "_logits", logits)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_kl(teacher, student, torch.tensor([200]), tile_elements=257 * 16).sum().backward()
    assert sum(tensor.numel() for tensor in kept) < 257 * 32
    # two models, two passes, every pair of positions once in each
    assert max(created) <= 257 * 16 and sum(created) == 4 * 257 * 257


def test_different_heads_are_a_mistake() -> None:
    teacher, student = vectors()
    with pytest.raises(ValueError, match="same number of relation heads"):
        relation_kl(teacher[:, :1], student)
