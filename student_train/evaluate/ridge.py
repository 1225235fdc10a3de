"""How much of one set of vectors is a linear function of another: ridge regression from accumulated moments.

`Moments` collects counts, sums and products of pairs (x, y) batch by batch in float64, so that rows never have to be
held: memory is d_x * (d_x + d_y) numbers whatever the amount of text. `fit_ridge` solves the centred normal equations

    W = (C_xx + lambda I)^-1 C_xy,   b = mean_y - W^T mean_x

which leaves the intercept free of the penalty. `normalised_error` evaluates a fitted map on the moments of *other*
rows, so that no second pass over the text is needed.

The strength lambda is the one of a grid (1e-6 to 10 times the mean variance of x) with the least generalised
cross-validation score n * RSS / (n - 1 - trace(H))^2 on the rows of the fit (Golub, Heath and Wahba 1979): a few
hundred tokens then need no other setting than a million.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE_STRENGTHS = torch.logspace(-6, 1, 29, dtype=torch.float64)


class Moments:
    """Running first and second moments of pairs (x, y) of vectors, in float64."""

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._origin_x: Tensor | None = None
        self._origin_y: Tensor | None = None
        self._sum_x = torch.zeros(width_x, dtype=torch.float64, device=device)
        self._sum_y = torch.zeros(width_y, dtype=torch.float64, device=device)
        self._product_xx = torch.zeros(width_x, width_x, dtype=torch.float64, device=device)
        self._product_xy = torch.zeros(width_x, width_y, dtype=torch.float64, device=device)
        self._square_y = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x_NX: Tensor, y_NY: Tensor) -> None:
        """Count the pairs of rows of `x_NX` [N, d_x] and `y_NY` [N, d_y]."""
        if len(x_NX) == 0:
            return
        x_NX, y_NY = x_NX.double(), y_NY.double()
        if self._origin_x is None or self._origin_y is None:
            # products are taken about the first vectors' mean: large constant components cost no digits later
            self._origin_x, self._origin_y = x_NX.mean(0), y_NY.mean(0)
        x_NX, y_NY = x_NX - self._origin_x, y_NY - self._origin_y
        self.count += len(x_NX)
        self._sum_x += x_NX.sum(0)
        self._sum_y += y_NY.sum(0)
        self._product_xx += x_NX.T @ x_NX
        self._product_xy += x_NX.T @ y_NY
        self._square_y += y_NY.square().sum()

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, [d_x]."""
        assert self._origin_x is not None
        return self._origin_x + self._sum_x / self.count

    @property
    def mean_y(self) -> Tensor:
        """Mean of y, [d_y]."""
        assert self._origin_y is not None
        return self._origin_y + self._sum_y / self.count

    def covariance_xx(self) -> Tensor:
        """E (x - mean)(x - mean)^T, [d_x, d_x]."""
        shift = self._sum_x / self.count
        return self._product_xx / self.count - torch.outer(shift, shift)

    def covariance_xy(self) -> Tensor:
        """E (x - mean)(y - mean)^T, [d_x, d_y]."""
        return self._product_xy / self.count - torch.outer(self._sum_x, self._sum_y) / self.count**2

    def variance_y(self) -> Tensor:
        """E ||y - mean||^2, a scalar."""
        return self._square_y / self.count - (self._sum_y / self.count).square().sum()


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """y ~ x @ weight + bias, and the strength (in units of the mean variance of x) that it was fitted with."""

    weight_XY: Tensor
    bias_Y: Tensor
    strength: float


def fit_ridge(moments: Moments) -> LinearMap:
    """The ridge map from x to y, its strength chosen by generalised cross-validation on the same rows."""
    variance_X, basis_XX = torch.linalg.eigh(moments.covariance_xx())
    variance_X = variance_X.clamp(min=0)
    scale = variance_X.mean().clamp(min=torch.finfo(torch.float64).tiny)
    cross_XY = basis_XX.T @ moments.covariance_xy()
    power_X = cross_XY.square().sum(1)
    penalty_S = _RELATIVE_STRENGTHS.to(variance_X.device) * scale
    shrunk_SX = variance_X + penalty_S[:, None]
    explained_S = (power_X * (variance_X + 2 * penalty_S[:, None]) / shrunk_SX.square()).sum(1)
    residual_S = (moments.variance_y() - explained_S).clamp(min=0)
    freedom_S = (variance_X / shrunk_SX).sum(1)
    score_S = residual_S / (1 - (1 + freedom_S) / moments.count).clamp(min=1e-12).square()
    best = int(score_S.argmin())
    weight_XY = basis_XX @ (cross_XY / shrunk_SX[best][:, None])
    bias_Y = moments.mean_y - moments.mean_x @ weight_XY
    return LinearMap(weight_XY=weight_XY, bias_Y=bias_Y, strength=float(_RELATIVE_STRENGTHS[best]))


def normalised_error(linear: LinearMap, moments: Moments) -> float:
    """E ||y - W^T x - b||^2 / E ||y - mean||^2 over the rows that `moments` has seen."""
    weight = linear.weight_XY
    explained = (weight * moments.covariance_xy()).sum()
    spread = (weight * (moments.covariance_xx() @ weight)).sum()
    offset = moments.mean_y - moments.mean_x @ weight - linear.bias_Y
    variance = moments.variance_y()
    error = variance - 2 * explained + spread + offset.square().sum()
    return float(error / variance)
