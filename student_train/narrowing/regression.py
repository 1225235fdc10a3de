"""Linear maps fitted to a sample: ridge regression towards a map that is known to be about right.

Shapes: N positions, I inputs, O outputs. Products are computed in the sample's precision, solved in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRIOR_TOKENS = 100
"""The prior counts as much as so many positions."""


@torch.no_grad()
def fit_linear(linear: nn.Linear, inputs_NI: Tensor, targets_NO: Tensor, prior_OI: Tensor) -> None:
    """Set a linear map and its bias to what takes `inputs_NI` to `targets_NO` best.

    Minimises ||x W' + b - y||^2 + k s^2 ||W - prior||^2, summed over positions, with k = PRIOR_TOKENS and s^2 the mean
    variance of an input: directions in which the sample does not vary keep what the prior says.
    """
    input_mean_I, target_mean_O = inputs_NI.mean(0), targets_NO.mean(0)
    centred_NI = inputs_NI - input_mean_I
    prior_OI = prior_OI.to(inputs_NI)
    # what the prior leaves to be explained, so that a prior that explains all comes back to the last bit but few
    rest_NO = targets_NO - target_mean_O - centred_NI @ prior_OI.T
    moments_II = (centred_NI.T @ centred_NI).double()
    scale = moments_II.diagonal().sum() / centred_NI.numel()
    moments_II.diagonal().add_(PRIOR_TOKENS * scale + torch.finfo(torch.float64).tiny)
    correction_IO = torch.linalg.solve(moments_II.cpu(), (centred_NI.T @ rest_NO).double().cpu())
    weight_OI = prior_OI.double().cpu() + correction_IO.T
    linear.weight.copy_(weight_OI)
    linear.bias.copy_(target_mean_O.double().cpu() - weight_OI @ input_mean_I.double().cpu())


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, inputs_ND: Tensor, targets_ND: Tensor, prior_D: Tensor) -> None:
    """Set scale and bias of a layer norm to what takes `inputs_ND` to `targets_ND` best, component by component."""
    normed_ND = nn.functional.layer_norm(inputs_ND, norm.normalized_shape, eps=norm.eps).double()
    targets_ND = targets_ND.double()
    mean_D, target_mean_D = normed_ND.mean(0), targets_ND.mean(0)
    centred_ND = normed_ND - mean_D
    prior_D = prior_D.to(centred_ND)
    rest_ND = targets_ND - target_mean_D - centred_ND * prior_D
    moments_D = (centred_ND**2).sum(0)
    scale_D = prior_D + (centred_ND * rest_ND).sum(0) / (moments_D + PRIOR_TOKENS * moments_D.mean() / len(normed_ND))
    norm.weight.copy_(scale_D)
    norm.bias.copy_(target_mean_D - scale_D * mean_D)
