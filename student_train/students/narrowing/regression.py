"""Maps fitted to a sample: least squares, drawn towards a map that is known to be about right.

Minimised is sum ||W x + b - y||^2 + k s^2 ||W - prior||^2 with k = `PRIOR_POSITIONS` and s^2 the mean variance of an
input, so that directions in which the sample hardly varies keep what the prior says. A prior that explains everything
is returned as it is. Products are computed in the sample's precision, and solved in float64 on the CPU.
Shapes: N positions, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRIOR_POSITIONS = 1_000
"""The prior weighs as much as so many positions of the sample."""
_TINY = torch.finfo(torch.float64).tiny


def fit_linear(inputs_NI: Tensor, targets_NO: Tensor, prior_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [O, I] and bias [O] of the linear map that takes `inputs_NI` to `targets_NO` best, in float64."""
    input_mean_I, target_mean_O = inputs_NI.mean(0), targets_NO.mean(0)
    centred_NI = inputs_NI - input_mean_I
    rest_NO = targets_NO - target_mean_O - centred_NI @ prior_OI.to(inputs_NI).T
    moments_II = (centred_NI.T @ centred_NI).double().cpu()
    variance = float(moments_II.diagonal().sum()) / centred_NI.numel()
    moments_II.diagonal().add_(PRIOR_POSITIONS * variance + _TINY)
    correction_IO = torch.linalg.solve(moments_II, (centred_NI.T @ rest_NO).double().cpu())
    weight_OI = prior_OI.double().cpu() + correction_IO.T
    return weight_OI, target_mean_O.double().cpu() - weight_OI @ input_mean_I.double().cpu()


@torch.no_grad()
def set_linear(linear: nn.Linear, inputs_NI: Tensor, targets_NO: Tensor, prior_OI: Tensor) -> None:
    """Fit a linear map of a model."""
    weight_OI, bias_O = fit_linear(inputs_NI, targets_NO, prior_OI)
    linear.weight.copy_(weight_OI)
    linear.bias.copy_(bias_O)


@torch.no_grad()
def set_norm(norm: nn.LayerNorm, inputs_NI: Tensor, targets_NI: Tensor, prior_I: Tensor) -> None:
    """Fit scale and bias of a layer norm of a model, component by component; `prior_I` is a scale."""
    normed_NI = nn.functional.layer_norm(inputs_NI, norm.normalized_shape, eps=norm.eps).double()
    target_mean_I, normed_mean_I = targets_NI.double().mean(0), normed_NI.mean(0)
    centred_NI = normed_NI - normed_mean_I
    prior_I = prior_I.to(centred_NI)
    rest_NI = targets_NI - target_mean_I - centred_NI * prior_I
    moments_I = (centred_NI**2).sum(0)
    strength = PRIOR_POSITIONS * moments_I.sum() / centred_NI.numel() + _TINY
    scale_I = prior_I + (centred_NI * rest_NI).sum(0) / (moments_I + strength)
    norm.weight.copy_(scale_I)
    norm.bias.copy_(target_mean_I - scale_I * normed_mean_I)


def fit_map(
    inputs_NI: Tensor, targets_NO: Tensor, prior_OI: Tensor, *, bias: bool, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `fit_linear`, for maps that may have no bias, and positions that count differently, 1 in the mean."""
    if weights_N is not None:
        weights_N = (weights_N / weights_N.mean())[:, None].sqrt()
    root_N1 = inputs_NI.new_ones(len(inputs_NI), 1) if weights_N is None else weights_N.to(inputs_NI)
    share_N1 = root_N1**2 / len(inputs_NI)
    means = [(part * share_N1).sum(0) if bias else part.new_zeros(part.shape[1]) for part in (inputs_NI, targets_NO)]
    centred_NI, rest_NO = inputs_NI - means[0], targets_NO - means[1]
    rest_NO = (rest_NO - centred_NI @ prior_OI.to(inputs_NI).T) * root_N1
    centred_NI = centred_NI * root_N1
    moments_II = (centred_NI.T @ centred_NI).double().cpu()
    moments_II.diagonal().add_(PRIOR_POSITIONS * float(moments_II.diagonal().mean()) / len(inputs_NI) + _TINY)
    correction_IO = torch.linalg.solve(moments_II, (centred_NI.T @ rest_NO).double().cpu())
    weight_OI = prior_OI.double().cpu() + correction_IO.T
    return weight_OI, means[1].double().cpu() - weight_OI @ means[0].double().cpu() if bias else None
