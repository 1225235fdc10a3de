"""The relation loss against the published formula in float64, written with loops over rows, heads and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train import kernels
from student_train.kernels import relation_kl, relation_kl_sum, stored_relation_kl_sum
from teacher_cache.models.attention import relation_matrices

RAGGED = (9, 1, 6)
EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])


def kl_by_loops(teacher_BATd: Tensor, student_BATd: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sum of KL_i over real positions and mean over heads, in float64: one softmax at a time."""
    batch, heads, _, _ = student_BATd.shape
    rows = []
    for b in range(batch):
        for a in range(heads):
            for i in range(lengths[b]):
                logs = []
                for vectors_BATd in (teacher_BATd.double(), student_BATd.double()):
                    vectors_Td = vectors_BATd[b, a, : lengths[b]]
                    logits_T = torch.stack([vectors_Td[i] @ vectors_Td[j] for j in range(lengths[b])])
                    logs.append((logits_T / math.sqrt(vectors_Td.shape[1])).log_softmax(0))
                rows.append((logs[0].exp() * (logs[0] - logs[1])).sum())
    return torch.stack(rows).sum() / heads


@EACH_BACKEND
def test_sum_and_mean_over_heads_and_real_positions(backend: Any, vectors) -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    expected = kl_by_loops(teacher, student, RAGGED)
    assert expected > 1
    total = relation_kl_sum(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    mean = relation_kl(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(mean, expected / sum(RAGGED), rtol=1e-12, atol=0)
    everywhere = relation_kl(teacher, student, backend=backend)
    torch.testing.assert_close(everywhere, kl_by_loops(teacher, student, (9, 9, 9)) / 27, rtol=1e-12, atol=0)


@EACH_BACKEND
def test_gradient_of_the_loops(backend: Any, vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    _, expected = value_and_gradient(kl_by_loops, teacher, student, RAGGED)
    _, found = value_and_gradient(relation_kl_sum, teacher, student, torch.tensor(RAGGED), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert not found[1, :, 1:].any()


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_right(backend: Any, dtype: torch.dtype, vectors, value_and_gradient) -> None:
    teacher, student = vectors(positions=11, teacher_width=16, student_width=16, scale=1.0)
    largest = max(float((v @ v.transpose(-1, -2)).abs().max()) / 4 for v in (teacher, student))
    teacher, student = (v * math.sqrt(1e4 / largest) for v in (teacher, student))
    # padding holds anything, here numbers whose logits would drown all others
    for v in (teacher, student):
        v[1, :, 6:] *= 100
    teacher, student = teacher.to(dtype), student.to(dtype)
    length_B = torch.tensor([11, 6, 11])
    expected = kl_by_loops(teacher, student, (11, 6, 11))
    value, gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B, backend=backend)
    assert torch.isfinite(gradient).all()
    assert not gradient[1, :, 6:].any()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)


@EACH_BACKEND
def test_equal_vectors_cost_nothing_even_at_large_logits(backend: Any, vectors, value_and_gradient) -> None:
    teacher, _ = vectors(teacher_width=16, scale=40.0)
    teacher = teacher.float()
    value, gradient = value_and_gradient(relation_kl_sum, teacher, teacher.clone(), None, backend=backend)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-5


@EACH_BACKEND
def test_empty_rows_count_nothing(backend: Any, vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    value, gradient = value_and_gradient(relation_kl_sum, teacher, student, torch.tensor([9, 0, 6]), backend=backend)
    torch.testing.assert_close(value, kl_by_loops(teacher, student, (9, 0, 6)), rtol=1e-12, atol=0)
    assert torch.isfinite(gradient).all() and not gradient[1].any()


@EACH_BACKEND
def test_only_the_student_gets_a_gradient(backend: Any, vectors) -> None:
    teacher, student = (v.requires_grad_() for v in (v.detach() for v in vectors()))
    relation_kl_sum(teacher, student, torch.tensor(RAGGED), backend=backend).backward()
    assert teacher.grad is None and student.grad is not None


def test_matrices_in_place_of_the_teachers_vectors(vectors, value_and_gradient, relative_error) -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    real_BT = torch.arange(9) < length_B[:, None]
    matrices_BATT = relation_matrices(teacher.transpose(1, 2).flatten(2), 2, real_BT)
    value, gradient = value_and_gradient(stored_relation_kl_sum, matrices_BATT.double(), student, length_B)
    want, want_gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert relative_error(gradient, want_gradient) < 1e-5
    halved, _ = value_and_gradient(stored_relation_kl_sum, matrices_BATT.half(), student, length_B)
    assert float(halved) == pytest.approx(float(want), rel=1e-3)
    # a distribution compared with itself, rounded: never below zero
    assert float(stored_relation_kl_sum(matrices_BATT.half(), teacher, length_B)) >= 0


def test_different_heads_are_a_mistake(vectors) -> None:
    teacher, student = vectors()
    with pytest.raises(ValueError, match="same number of relation heads"):
        relation_kl(teacher[:, :1], student)


def test_what_the_gpu_kernels_cannot_take_is_said(vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = vectors()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the vectors are on 'cpu'"):
        relation_kl(teacher, student, backend="triton")
    pytest.importorskip("triton", reason="the other obstacles come after a missing Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="these vectors are float64"):
        relation_kl(teacher, student, backend="triton")
    teacher, student = vectors(teacher_width=129)
    with pytest.raises(ValueError, match="129 components are wider than 128"):
        relation_kl(teacher.float(), student.float(), backend="triton")


def test_the_package_exports_the_loss() -> None:
    assert set(kernels.__all__) == {"Backend", "relation_kl", "relation_kl_sum", "stored_relation_kl_sum"}
