"""Fitted maps against plain least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from student_train.students.narrowing.regression import PRIOR_POSITIONS, fit_linear, set_norm


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("positions", [3, 500])
def test_ridge_regression_towards_a_prior(positions: int, draw: torch.Generator) -> None:
    inputs, targets = (torch.randn(positions, size, generator=draw) for size in (7, 4))
    inputs *= torch.arange(1, 8)
    prior = torch.randn(4, 7, generator=draw)
    weight, bias = fit_linear(inputs, targets, prior)
    # k s^2 ||W - prior||^2 as so many further rows to fit
    x, y = inputs.double() - inputs.double().mean(0), targets.double() - targets.double().mean(0)
    pull = (PRIOR_POSITIONS * x.square().mean()).sqrt() * torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([y, pull @ prior.double().T])).solution.T
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        bias, targets.double().mean(0) - expected @ inputs.double().mean(0), rtol=1e-5, atol=1e-5
    )


def test_a_prior_that_explains_everything_comes_back(draw: torch.Generator) -> None:
    inputs, prior = torch.randn(50, 7, generator=draw), torch.randn(4, 7, generator=draw)
    weight, bias = fit_linear(inputs, inputs @ prior.T + 3, prior)
    torch.testing.assert_close(weight, prior.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(bias, torch.full((4,), 3.0, dtype=torch.float64), rtol=0, atol=1e-5)


def test_inputs_that_never_vary_keep_the_prior(draw: torch.Generator) -> None:
    prior = torch.randn(4, 7, generator=draw)
    weight, bias = fit_linear(torch.ones(20, 7), torch.full((20, 4), 2.0), prior)
    assert torch.equal(weight, prior.double())
    torch.testing.assert_close(prior.double().sum(1) + bias, torch.full((4,), 2.0, dtype=torch.float64))


def test_norms_are_fitted_component_by_component(draw: torch.Generator) -> None:
    inputs, scale, shift = (torch.randn(*size, generator=draw) for size in ((400, 6), (6,), (6,)))
    targets = nn.functional.layer_norm(inputs, (6,)) * scale + shift
    norm = nn.LayerNorm(6)
    set_norm(norm, inputs, targets, scale)
    torch.testing.assert_close(norm.weight, scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.bias, shift, rtol=0, atol=1e-5)
    # far from the prior, the fit lies between it and plain least squares by their weights in positions
    set_norm(norm, inputs, targets, torch.zeros(6))
    normed = nn.functional.layer_norm(inputs, (6,))
    moments = (normed - normed.mean(0)).square().sum(0)
    strength = PRIOR_POSITIONS * moments.sum() / normed.numel()
    torch.testing.assert_close(norm.weight, scale * moments / (moments + strength), rtol=1e-4, atol=1e-5)
