"""How much of one set of vectors is a linear function of another: ridge regression from accumulated moments.

`PairMoments` collects counts, sums and products of pairs (x, y) batch by batch in float64, so that rows never have
to be held: memory is d_x * (d_x + d_y) numbers whatever the amount of text. `fit_ridge` solves the centred equations

    W = (C_xx + lambda I)^-1 C_xy,   b = mean_y - W^T mean_x

which leaves the intercept free of the penalty, and `normalised_error` evaluates a fitted map on the statistics of
*other* rows, so that no second pass over the text is needed.

The strength is chosen by cross-validation between two sets of rows, from a grid of 1e-6 to 100 times the mean variance
of x, so that the same setting serves a thousand tokens and a million. The two sets consist of whole rows because tokens
of one row resemble each other. Rules that take all tokens for independent (generalised cross-validation) choose too
small a strength and overfit, until the map does worse than guessing the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE_STRENGTHS = torch.logspace(-6, 2, 33, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Number, means and central second moments of pairs (x, y); `variance_y` is E||y - mean||^2."""

    count: int
    mean_x: Tensor
    mean_y: Tensor
    covariance_xx: Tensor
    covariance_xy: Tensor
    variance_y: Tensor


class PairMoments:
    """Running sums of pairs (x, y) of vectors, in float64."""

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self._origin_x, self._origin_y = zeros(width_x), zeros(width_y)
        self._sum_x, self._sum_y = zeros(width_x), zeros(width_y)
        self._product_xx, self._product_xy = zeros(width_x, width_x), zeros(width_x, width_y)
        self._square_y = zeros()

    def add(self, x_NX: Tensor, y_NY: Tensor) -> None:
        """Count the pairs of rows of `x_NX` [N, d_x] and `y_NY` [N, d_y]."""
        if len(x_NX) == 0:
            return
        x_NX, y_NY = x_NX.double(), y_NY.double()
        if self.count == 0:
            # products are taken about the first vectors' mean: large constant components cost no digits later
            self._origin_x, self._origin_y = x_NX.mean(0), y_NY.mean(0)
        x_NX, y_NY = x_NX - self._origin_x, y_NY - self._origin_y
        self.count += len(x_NX)
        self._sum_x += x_NX.sum(0)
        self._sum_y += y_NY.sum(0)
        self._product_xx += x_NX.T @ x_NX
        self._product_xy += x_NX.T @ y_NY
        self._square_y += y_NY.square().sum()

    def statistics(self) -> Statistics:
        """Means and central moments of what was added, at least one pair."""
        shift_x, shift_y = self._sum_x / self.count, self._sum_y / self.count
        return Statistics(
            count=self.count,
            mean_x=self._origin_x + shift_x,
            mean_y=self._origin_y + shift_y,
            covariance_xx=self._product_xx / self.count - torch.outer(shift_x, shift_x),
            covariance_xy=self._product_xy / self.count - torch.outer(shift_x, shift_y),
            variance_y=self._square_y / self.count - shift_y.square().sum(),
        )


def pool(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of both sets of pairs together."""
    share = first.count / (first.count + second.count)
    between = share * (1 - share)
    apart_x, apart_y = first.mean_x - second.mean_x, first.mean_y - second.mean_y

    def mix(one: Tensor, other: Tensor) -> Tensor:
        return share * one + (1 - share) * other

    return Statistics(
        count=first.count + second.count,
        mean_x=mix(first.mean_x, second.mean_x),
        mean_y=mix(first.mean_y, second.mean_y),
        covariance_xx=mix(first.covariance_xx, second.covariance_xx) + between * torch.outer(apart_x, apart_x),
        covariance_xy=mix(first.covariance_xy, second.covariance_xy) + between * torch.outer(apart_x, apart_y),
        variance_y=mix(first.variance_y, second.variance_y) + between * apart_y.square().sum(),
    )


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """y ~ x @ weight + bias, and the strength (in units of the mean variance of x) that it was fitted with."""

    weight_XY: Tensor
    bias_Y: Tensor
    strength: float


def fit_ridge(first: Statistics, second: Statistics) -> LinearMap:
    """The ridge map from x to y on both sets, at the strength at which each set's own map serves the other best."""
    both = pool(first, second)
    unit = both.covariance_xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    # the penalty on summed squares is what carries over to another number of pairs, hence the products with counts
    penalty_S = _RELATIVE_STRENGTHS.to(unit.device) * unit * both.count
    errors_S = second.count * ridge_errors(first, second, penalty_S / first.count)
    errors_S += first.count * ridge_errors(second, first, penalty_S / second.count)
    best = int(errors_S.argmin())
    penalised_XX = both.covariance_xx + penalty_S[best] / both.count * torch.eye(len(both.mean_x)).to(both.mean_x)
    weight_XY = torch.linalg.solve(penalised_XX, both.covariance_xy)
    bias_Y = both.mean_y - both.mean_x @ weight_XY
    return LinearMap(weight_XY=weight_XY, bias_Y=bias_Y, strength=float(_RELATIVE_STRENGTHS[best]))


def ridge_errors(fit: Statistics, test: Statistics, penalty_S: Tensor) -> Tensor:
    """E||y - W^T x - b||^2 on `test` of the maps fitted on `fit`, for every penalty at the price of one.

    In the eigenbasis of C_xx the maps are D G, D = 1 / (variance + penalty) diagonal and G = C_xy rotated.
    """
    variance_X, basis_XX = torch.linalg.eigh(fit.covariance_xx)
    rotated_XY = basis_XX.T @ fit.covariance_xy
    shrink_SX = 1 / (variance_X.clamp(min=0) + penalty_S[:, None])
    spread_XX = (basis_XX.T @ test.covariance_xx @ basis_XX) * (rotated_XY @ rotated_XY.T)
    spread_S = ((shrink_SX @ spread_XX) * shrink_SX).sum(1)
    explained_S = shrink_SX @ (rotated_XY * (basis_XX.T @ test.covariance_xy)).sum(1)
    apart_X = basis_XX.T @ (test.mean_x - fit.mean_x)
    offset_SY = test.mean_y - fit.mean_y - (shrink_SX * apart_X) @ rotated_XY
    errors_S: Tensor = test.variance_y - 2 * explained_S + spread_S + offset_SY.square().sum(1)
    return errors_S


def normalised_error(linear: LinearMap, test: Statistics) -> float:
    """E||y - W^T x - b||^2 / E||y - mean||^2 over the pairs behind `test`."""
    weight = linear.weight_XY
    explained = (weight * test.covariance_xy).sum()
    spread = (weight * (test.covariance_xx @ weight)).sum()
    offset = test.mean_y - test.mean_x @ weight - linear.bias_Y
    error = test.variance_y - 2 * explained + spread + offset.square().sum()
    return float(error / test.variance_y)
