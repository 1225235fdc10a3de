"""How far stored values may be off: sums against plain float64, and errors that must never pass."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.verify.deep.tolerance import LargestError, VectorErrors, arithmetic, rounding_unit


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


@pytest.mark.parametrize("dtype, bits", [("float64", 53), ("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_a_rounding_is_half_a_unit_in_the_last_place(dtype: str, bits: int) -> None:
    assert rounding_unit(dtype) == 2.0**-bits
    one = torch.ones((), dtype=getattr(torch, dtype))
    assert one + 2 * rounding_unit(dtype) != one and one + rounding_unit(dtype) == one


def test_arithmetic_may_differ_by_roundings_of_the_largest_and_what_was_seen_to_differ() -> None:
    assert arithmetic(torch.zeros(3), 2.0, "float32") == 16 * 2 * 2.0**-24
    assert arithmetic(torch.tensor([0.5, 0.25]), 0.0, "float32") == 4 * 0.5
    assert arithmetic(torch.empty(0), 1.0, "bfloat16") == 16 * 2.0**-8


def rows_with(share: float, count: int, seed: int) -> VectorErrors:
    """Errors of so many rows of 30 tokens whose NMSE is `share`, declared 1%."""
    draw = torch.Generator().manual_seed(seed)
    errors = VectorErrors("x", 0.01, "float32")
    for _ in range(count):
        row = torch.randn(30, 16, generator=draw)
        errors.add(row + share**0.5 * torch.randn(30, 16, generator=draw), row, row)
    return errors


@pytest.mark.parametrize("count", [1, 4, 16, 40])
def test_the_declared_error_passes_and_a_multiple_of_it_does_not(count: int) -> None:
    """With few rows it may be twice as large by chance."""
    for seed in range(10):
        assert not rows_with(0.01, count, seed).result().problem
        assert "beyond the limit of" in rows_with(0.024, count, seed).result().problem
    if count >= 16:
        assert rows_with(0.014, count, 0).result().problem, "many rows tell more"


def test_values_each_with_its_bound_are_counted_where_they_are_beyond_it() -> None:
    live_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    bound_ND = torch.tensor([[0.1, 0.1], [0.0, 0.2]])
    errors = VectorErrors("x", None, "float32")
    errors.add(live_ND + torch.tensor([[0.1, -0.2], [0.001, 0.1]]), live_ND, live_ND, bound_ND=bound_ND)
    result = errors.result()
    assert result.problem == "2 values are beyond the codec's bound"
    # the variance around the mean (2, 3) is 4 in all
    assert result.stored == pytest.approx((0.01 + 0.04 + 0.000001 + 0.01) / 4, rel=1e-4)
    assert result.declared == pytest.approx((0.01 + 0.01 + 0.04) / 4, rel=1e-4)


def test_an_expected_error_is_that_of_each_row_times_a_scale() -> None:
    errors = VectorErrors("x", None, "float32")
    for expected in (0.5, 0.3):
        live_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        errors.add(live_ND + 0.1, live_ND, live_ND, expected=expected)
    assert errors.result().declared == pytest.approx(0.8 / 8)
    assert errors.result(3.0).declared == pytest.approx(2.4 / 8)


def test_rows_that_are_all_alike_have_no_variance_and_still_a_verdict() -> None:
    row = torch.ones(4, 3)
    for off, wrong in ((0.0, False), (0.5, True)):
        errors = VectorErrors("x", 0.01, "float32")
        errors.add(row + off, row, row)
        assert bool(errors.result().problem) == wrong


def test_the_largest_of_errors_with_bounds_of_their_own() -> None:
    largest = LargestError("x", "error")
    largest.add(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.4]), torch.tensor([0.0, 0.01]), 0.0)
    largest.add(torch.tensor([0.3]), 0.25, torch.tensor([0.02]), 0.1)
    largest.add(torch.empty(0), torch.empty(0), torch.empty(0), 0.0)
    result = largest.result()
    assert (result.stored, result.declared, result.noise) == pytest.approx((0.5, 0.4, 0.02))
    assert result.problem == "1 are beyond the declared error"
