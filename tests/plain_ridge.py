"""Ridge regression as a textbook writes it, for tests of the one from accumulated moments."""

from __future__ import annotations

import torch


def plain_ridge_error(
    x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor, y_test: torch.Tensor, strength: float
) -> float:
    """Ridge with a free intercept as ordinary least squares on stacked rows, then the error row by row."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    penalty = strength * (x - mean_x).square().mean() * len(x)
    stacked_x = torch.cat([x - mean_x, penalty.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    stacked_y = torch.cat([y - mean_y, y.new_zeros(x.shape[1], y.shape[1])])
    weight = torch.linalg.lstsq(stacked_x, stacked_y, driver="gelsd").solution
    error = (y_test - mean_y - (x_test - mean_x) @ weight).square().sum(1).mean()
    return float(error / (y_test - y_test.mean(0)).square().sum(1).mean())
