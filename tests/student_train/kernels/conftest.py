"""Random vectors of teacher and student, and a loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Vectors = Callable[..., tuple[Tensor, Tensor]]
ValueAndGradient = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def vectors() -> Vectors:
    """`vectors(batch=3, heads=2, positions=9, teacher_width=8, student_width=5, scale=1.5)` in float64."""

    def make(
        *,
        batch: int = 3,
        heads: int = 2,
        positions: int = 9,
        teacher_width: int = 8,
        student_width: int = 5,
        scale: float = 1.5,
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        shapes = [(batch, positions, heads, width) for width in (teacher_width, student_width)]
        teacher, student = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        # as the loss gets them: a view of the concatenated heads
        return teacher.transpose(1, 2), student.transpose(1, 2)

    return make


@pytest.fixture(scope="session")
def value_and_gradient() -> ValueAndGradient:
    """`value_and_gradient(function, teacher, student, ...)`: function(teacher, student, ...) and its gradient."""

    def compute(function: Any, teacher: Tensor, student: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        value = function(teacher, student, *args, **options)
        (gradient,) = torch.autograd.grad(value, student)
        return value.detach(), gradient

    return compute


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """|found - expected| / |expected|."""

    def compute(found: Tensor, expected: Tensor) -> float:
        return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())

    return compute
