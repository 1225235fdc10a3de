"""How far stored values may be off: sums against plain float64, and errors that must never pass."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.verify.deep.tolerance import LargestError, VectorErrors


def test_nmse_is_that_of_all_rows_around_their_common_mean() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randn((count, 8), generator=draw, dtype=torch.float64) + 100 for count in (3, 7, 5)]
    errors = VectorErrors("x", 0.02, "float32")
    every, noisy = [], []
    for row in rows:
        noise = 0.1 * torch.randn(row.shape, generator=draw, dtype=torch.float64)
        errors.add(row + noise, row, row)
        every.append(row)
        noisy.append(noise)
    everything = torch.cat(every)
    want = torch.cat(noisy).square().sum() / (everything - everything.mean(0)).square().sum()
    result = errors.result()
    assert result.stored == pytest.approx(float(want), rel=1e-9)
    assert not result.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_numbers_never_pass(value: float) -> None:
    row = torch.randn(5, 8)
    broken = row.clone()
    broken[2, 3] = value
    for declared, bound in ((0.5, None), (None, torch.full((5, 8), 100.0))):
        errors = VectorErrors("x", declared, "float32")
        errors.add(broken, row, row, bound_ND=bound)
        assert errors.result().problem
    largest = LargestError("x", "error")
    largest.add(torch.tensor([value]), 1.0, torch.zeros(1), 0.0)
    assert largest.result().problem


def test_more_noise_in_the_teacher_allows_more_error() -> None:
    row = torch.randn(5, 8)
    for noise, ok in ((0.0, False), (0.05, True)):
        errors = VectorErrors("x", None, "float32")
        errors.add(row + 0.1, row, row + noise, bound_ND=torch.full((5, 8), 0.01))
        assert (not errors.result().problem) == ok


def test_tokens_may_differ_where_values_have_bounds_and_not_where_the_average_is_declared() -> None:
    row = torch.randn(200, 8)
    error = torch.zeros(200, 8)
    error[7] = 0.5
    bound = torch.full((200, 8), 1e-3)
    bound[7] = 0.5
    errors = VectorErrors("x", None, "float32")
    errors.add(row + error, row, row, bound_ND=bound)
    assert not errors.result().problem
    errors = VectorErrors("x", 0.02, "float32")
    errors.add(row + error, row, row)
    assert "a token is off" in errors.result().problem
