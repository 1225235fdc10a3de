"""The `nmse` codec: rotate by the principal components, round all of them with one step.

One step for all components is reverse water-filling: those of low variance vanish by themselves. Calibration, before
the first block, fixes rotation, step and packing of each stream; blocks are then coded independently of one another.

    codes = round(basis^T (x - mean) / step)        x' = mean + step * basis codes

NMSE = E||x - x'||^2 / E||x - mean||^2. A hidden state that is kept only for the queries, keys and values that follow is
coded in their metric: x = W h + b of all three, stacked. It lies in a space of the hidden width, so it costs no more
components, and what matters to attention is what is kept.

Where a few tokens would own the variance (`sinks.py`), they are kept beside the codes and coded as 0, the mean;
rotation, step and error are those of the others.

Shapes: N tokens, D components of x, H width of the hidden state, K components kept (K = H), S sinks. All tensor
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.base import refuse_infinite
from teacher_cache.codecs.packing import LARGEST_CODE, choose_packings, refuse_beyond
from teacher_cache.codecs.sample import CalibrationSample, coded_vectors, stacked_maps, total_variance
from teacher_cache.codecs.sinks import squared_distance, store_sinks
from teacher_cache.contract.manifest import SinkRecord, TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.device import tf32_products
from teacher_cache.models.attention import AttentionProjections, Projection, Replay

GROUP = 8
"""Components per packing are multiples of this, so that chunks of several components divide them."""
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A calibrated rotation and step: `basis_DK` has orthonormal columns in packing order."""

    basis_DK: torch.Tensor
    mean_D: torch.Tensor
    step: float

    def to(self, device: torch.device | str) -> Transform:
        """The same transform on another device."""
        return Transform(basis_DK=self.basis_DK.to(device), mean_D=self.mean_D.to(device), step=self.step)

    def synthesise(self, coordinates_NK: torch.Tensor) -> torch.Tensor:
        """Rotated coordinates (codes times step) -> vectors [N, D]."""
        return torch.addmm(self.mean_D, coordinates_NK, self.basis_DK.T)

    def analyse(self, values_ND: torch.Tensor) -> torch.Tensor:
        """Vectors -> rotated coordinates [N, K]."""
        return (values_ND - self.mean_D) @ self.basis_DK


class Quantiser:
    """The coding direction of a transform, for hidden states or vectors [N, H] on a device.

    With a record of `sinks`, some tokens are kept beside the codes: `find_sinks` says which, `keep` what of them.
    """

    def __init__(
        self, transform: Transform, projections: AttentionProjections | None, sinks: SinkRecord | None = None
    ) -> None:
        weight_DH, bias_D = stacked_maps(projections, len(transform.mean_D))
        basis_KD = transform.basis_DK.T.double()
        self.weight_KH = (basis_KD @ weight_DH / transform.step).float()
        self.offset_K1 = (basis_KD @ (bias_D - transform.mean_D.double()) / transform.step).float()[:, None]
        self.sinks = sinks
        self._mean_D = transform.mean_D
        self._projections = projections

    def find_sinks(self, values_NH: torch.Tensor, padding_N: torch.Tensor | None = None) -> torch.Tensor | None:
        """[N]: True at the tokens that are kept beside the codes; None in a stream that keeps none."""
        if self.sinks is None:
            return None
        # once for all batches: the maps of a wide teacher are larger than a batch
        self._mean_D = self._mean_D.to(values_NH.device)
        self._projections = None if self._projections is None else self._projections.to(values_NH.device)
        distance_N = squared_distance(coded_vectors(values_NH, self._projections), self._mean_D)
        # a product, where a power of a float raises: the record is read from a file
        far_N = distance_N > self.sinks.distance * self.sinks.distance
        return far_N if padding_N is None else far_N & ~padding_N

    def keep(self, values_SH: torch.Tensor) -> NDArray[np.floating]:
        """Sinks [S, D] as they are stored.

        Raises:
            TeacherError: their type cannot hold one.
        """
        assert self.sinks is not None
        return store_sinks(coded_vectors(values_SH, self._projections), self.sinks)

    def coordinates(
        self,
        values_NH: torch.Tensor,
        padding_N: torch.Tensor | None = None,
        sinks_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotated coordinates [K, N] in steps, codes once they are rounded; 0 at padding and where sinks are."""
        if self.weight_KH.device != values_NH.device:
            self.weight_KH, self.offset_K1 = (x.to(values_NH.device) for x in (self.weight_KH, self.offset_K1))
        # what a teacher computes in bfloat16 on a GPU keeps all of its bits
        with tf32_products(allowed=values_NH.is_cuda and values_NH.dtype == torch.bfloat16):
            steps_KN = torch.addmm(self.offset_K1, self.weight_KH, values_NH.float().T)
        for left_out_N in (padding_N, sinks_N):
            if left_out_N is not None:
                # a few columns: a mask over all of them would take longer than everything but the product
                steps_KN.index_fill_(1, left_out_N.nonzero()[:, 0], 0)
        return steps_KN

    def quantise(
        self,
        values_NH: torch.Tensor,
        padding_N: torch.Tensor | None = None,
        sinks_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes [K, N] in int16; 0 at padding and where sinks are, whatever the teacher gives there.

        Raises:
            TeacherError: a value is not finite, or is beyond any step that 16 bits can count.
        """
        codes_KN = self.coordinates(values_NH, padding_N, sinks_N).round_()
        refuse_beyond(float(codes_KN.abs().amax()) if codes_KN.numel() else 0.0)
        return codes_KN.to(torch.int16)


def fold_projections(transform: Transform, projections: AttentionProjections) -> AttentionProjections:
    """Projections of a hidden state -> the same projections of its rotated coordinates, at no further cost."""

    def fold(one: Projection) -> Projection:
        return Projection(weight=one.weight @ transform.basis_DK, bias=one.weight @ transform.mean_D + one.bias)

    return AttentionProjections(
        **{name: fold(getattr(projections, name)) for name in VECTORS}, replay=projections.replay
    )


def projections_of_projected(
    transform: Transform, widths: tuple[int, int, int], replay: Replay | None = None
) -> AttentionProjections:
    """The maps from rotated coordinates to queries, keys and values that were coded in their own metric."""
    weights, biases = transform.basis_DK.split(widths), transform.mean_D.split(widths)
    return AttentionProjections(
        **{n: Projection(weight=w, bias=b) for n, w, b in zip(VECTORS, weights, biases, strict=True)}, replay=replay
    )


def calibrate(
    sample: CalibrationSample, target: float, projections: AttentionProjections | None
) -> tuple[Transform, TransformRecord]:
    """Rotation from the fitted tokens, step and packing from others, the error as measured on yet others.

    Sinks are left out of all of these; their record is part of what is found.

    Raises:
        TeacherError: a token of the sample is not finite, or the covariance is not.
    """
    for values in (sample.moments()[1], *sample.tune, *sample.check):
        refuse_infinite(values)
    count, mean_H, covariance_HH, sinks = sample.ordinary()
    weight_DH, bias_D = stacked_maps(projections, len(mean_H))
    variance_H, axes_HH = torch.linalg.eigh(covariance_HH)
    basis_DK = axes_HH.flip(1)
    if projections is not None:
        basis_DK = torch.linalg.svd(weight_DH @ (axes_HH * variance_H.clamp_min(0).sqrt()), full_matrices=False).U
    mean_D = weight_DH @ mean_H + bias_D
    unit = Quantiser(Transform(basis_DK=basis_DK, mean_D=mean_D, step=1.0), projections, sinks)
    tune_NK, check_NK = (_coordinates(unit, torch.cat(part)) for part in (sample.tune, sample.check))
    # the variance of every token at hand: it varies more from row to row than the error of rounding does
    trace = total_variance(weight_DH, covariance_HH)
    others = float(tune_NK.square().sum() + check_NK.square().sum())
    variance = (count * trace + others) / (count + len(tune_NK) + len(check_NK))
    step = find_step(tune_NK, target * variance)
    codes_NK = torch.cat([tune_NK, check_NK]).div(step).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    order, components = choose_packings(codes_NK.to(torch.int16).numpy(), GROUP)
    transform = Transform(basis_DK=basis_DK[:, order].float().contiguous(), mean_D=mean_D.float(), step=step)
    nmse = rounding_error(check_NK, step) / variance if variance > 0 else 0.0
    return transform, TransformRecord(step=step, nmse=nmse, components=components, sinks=sinks)


def _coordinates(unit: Quantiser, values_NH: torch.Tensor) -> torch.Tensor:
    """Of the tokens that are coded."""
    if (sinks_N := unit.find_sinks(values_NH)) is not None:
        values_NH = values_NH[~sinks_N]
    return torch.addmm(unit.offset_K1.T.cpu(), values_NH, unit.weight_KH.T.cpu())


def rounding_error(coordinates_NK: torch.Tensor, step: float) -> float:
    """E||z - z'||^2 of rounding rotated coordinates to multiples of `step`."""
    error_NK = coordinates_NK - (coordinates_NK / step).round_() * step
    return float(error_NK.square().sum(dim=1).mean())


def find_step(coordinates_NK: torch.Tensor, error: float) -> float:
    """The step at which rounding has this error; any step if there is nothing to code.

    Rounding costs at most step^2 / 4 a component, so the step is at least twice the root of the error of one.
    """
    if not error > 0:
        return 1.0
    low = 2 * (error / coordinates_NK.shape[1]) ** 0.5
    high = max(4 * low, 4 * float(coordinates_NK.abs().amax()))
    return bisect_step(lambda step: rounding_error(coordinates_NK, step), error, low, high)


def bisect_step(error_of: Callable[[float], float], error: float, low: float, high: float) -> float:
    """The step between `low` and `high` that has this error, by bisection of its logarithm."""
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error_of(middle) < error else (low, middle)
        if high / low < 1 + 1e-4:
            break
    return float((low * high) ** 0.5)


def as_array(tensor: torch.Tensor) -> NDArray[np.generic]:
    """A tensor as a numpy array on the host."""
    return np.asarray(tensor.cpu().numpy())
