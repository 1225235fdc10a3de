"""The `nmse` codec: rotate by the principal components, round all of them with one step.

One step for all components is reverse water-filling: those of low variance vanish by themselves. Calibration, before
the first block, fixes rotation, step and packing of each stream; blocks are then coded independently of one another.

    codes = round(basis^T (x - mean) / step)        x' = mean + step * basis codes

NMSE = E||x - x'||^2 / E||x - mean||^2. A hidden state that is kept only for the queries, keys and values that follow is
coded in their metric: x = W h + b of all three, stacked. It lies in a space of the hidden width, so it costs no more
components, and what matters to attention is what is kept.

Shapes: N tokens, D components of x, H width of the hidden state, K components kept (K = H). All tensor functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.packing import LARGEST_CODE, choose_packings
from teacher_cache.contract.manifest import TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import TeacherError
from teacher_cache.models.attention import AttentionProjections, Projection

GROUP = 8
"""Components per packing are multiples of this, so that chunks of several components divide them."""
_BISECTIONS = 40


_FITTED_PER_COMPONENT = 48
"""Tokens for each component of a covariance: at this number the rotation costs held-out rows about 1% more error."""
_MEASURED_TOKENS = 8192
_MOST_ROWS, _ENOUGH_ROWS, _ENOUGH_SHARE = 384, 128, 20


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


class Quantiser:
    """The coding direction of a transform, for hidden states or vectors [N, H] on a device."""

    def __init__(self, transform: Transform, projections: AttentionProjections | None) -> None:
        weight_DH, bias_D = _stacked(projections, len(transform.mean_D))
        basis_KD = transform.basis_DK.T.double()
        self.weight_KH = (basis_KD @ weight_DH / transform.step).float()
        self.offset_K1 = (basis_KD @ (bias_D - transform.mean_D.double()) / transform.step).float()[:, None]

    def quantise(self, values_NH: torch.Tensor, padding_N: torch.Tensor | None = None) -> torch.Tensor:
        """Codes [K, N] in int16; 0 at padding, whatever the teacher gives there.

        Raises:
            TeacherError: a value is not finite, or is beyond any step that 16 bits can count.
        """
        if self.weight_KH.device != values_NH.device:
            self.weight_KH, self.offset_K1 = (x.to(values_NH.device) for x in (self.weight_KH, self.offset_K1))
        codes_KN = torch.addmm(self.offset_K1, self.weight_KH, values_NH.float().T).round_()
        if padding_N is not None:
            codes_KN.masked_fill_(padding_N, 0)
        largest = float(codes_KN.abs().amax()) if codes_KN.numel() else 0.0
        if not largest <= LARGEST_CODE:
            raise TeacherError(
                f"the teacher gave a value {largest:g} steps from the mean (16 bits hold {LARGEST_CODE}): a cut-off or "
                "undefined target would ruin training; check the checkpoint, use --dtype float32 if the teacher "
                "overflows in half precision, or a coarser --precision"
            )
        return codes_KN.to(torch.int16)


def _stacked(projections: AttentionProjections | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map from what the teacher gives to what is coded: [W_q; W_k; W_v] with biases, or the identity."""
    if projections is None:
        return torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    maps = [getattr(projections, name) for name in VECTORS]
    return torch.cat([m.weight for m in maps]).double(), torch.cat([m.bias for m in maps]).double()


def fold_projections(transform: Transform, projections: AttentionProjections) -> AttentionProjections:
    """Projections of a hidden state -> the same projections of its rotated coordinates, at no further cost."""

    def fold(one: Projection) -> Projection:
        return Projection(weight=one.weight @ transform.basis_DK, bias=one.weight @ transform.mean_D + one.bias)

    return AttentionProjections(**{name: fold(getattr(projections, name)) for name in VECTORS})


def projections_of_projected(transform: Transform) -> AttentionProjections:
    """The maps from rotated coordinates to queries, keys and values that were coded in their own metric."""
    weights, biases = transform.basis_DK.chunk(len(VECTORS)), transform.mean_D.chunk(len(VECTORS))
    return AttentionProjections(
        **{n: Projection(weight=w, bias=b) for n, w, b in zip(VECTORS, weights, biases, strict=True)}
    )


class CalibrationSample:
    """What calibration needs of one stream: moments of many tokens, and the values of a few others."""

    def __init__(self) -> None:
        self.count = 0
        self.shift_H: torch.Tensor | None = None
        self.sum_H: torch.Tensor | float = 0.0
        self.outer_HH: torch.Tensor | float = 0.0
        self.tune: list[torch.Tensor] = []
        self.check: list[torch.Tensor] = []

    def fit(self, values_NH: torch.Tensor) -> None:
        """Add tokens to mean and covariance."""
        values_NH = values_NH.float()
        if self.shift_H is None:
            # centred roughly before squaring: a large mean would eat the digits of a small variance
            self.shift_H = values_NH.mean(dim=0)
        shifted_NH = values_NH - self.shift_H
        self.count += len(shifted_NH)
        self.sum_H = self.sum_H + shifted_NH.double().sum(dim=0).cpu()
        self.outer_HH = self.outer_HH + (shifted_NH.T @ shifted_NH).double().cpu()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [H] and covariance [H, H], float64."""
        assert self.shift_H is not None and isinstance(self.sum_H, torch.Tensor)
        mean_H = self.sum_H / self.count
        return mean_H + self.shift_H.double().cpu(), self.outer_HH / self.count - torch.outer(mean_H, mean_H)


def calibrate(
    sample: CalibrationSample, target: float, projections: AttentionProjections | None
) -> tuple[Transform, TransformRecord]:
    """Rotation from the fitted tokens, step and packing from others, the error as measured on yet others.

    Raises:
        TeacherError: the sample has no finite covariance.
    """
    mean_H, covariance_HH = sample.moments()
    if not bool(torch.isfinite(covariance_HH).all()):
        raise TeacherError(
            "the teacher gave infinite or undefined values: they would ruin training; check the checkpoint, or use "
            "--dtype float32 if the teacher overflows in half precision"
        )
    weight_DH, bias_D = _stacked(projections, len(mean_H))
    variance_H, axes_HH = torch.linalg.eigh(covariance_HH)
    basis_DK = axes_HH.flip(1)
    if projections is not None:
        basis_DK = torch.linalg.svd(weight_DH @ (axes_HH * variance_H.clamp_min(0).sqrt()), full_matrices=False).U
    mean_D = weight_DH @ mean_H + bias_D
    unit = Quantiser(Transform(basis_DK=basis_DK, mean_D=mean_D, step=1.0), projections)
    tune_NK, check_NK = (_coordinates(unit, torch.cat(part)) for part in (sample.tune, sample.check))
    # the variance of every token at hand: it varies more from row to row than the error of rounding does
    trace = float((weight_DH @ covariance_HH * weight_DH).sum())
    others = float(tune_NK.square().sum() + check_NK.square().sum())
    variance = (sample.count * trace + others) / (sample.count + len(tune_NK) + len(check_NK))
    step = find_step(tune_NK, target * variance)
    codes_NK = torch.cat([tune_NK, check_NK]).div(step).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    order, components = choose_packings(codes_NK.to(torch.int16).numpy(), GROUP)
    transform = Transform(basis_DK=basis_DK[:, order].float().contiguous(), mean_D=mean_D.float(), step=step)
    nmse = rounding_error(check_NK, step) / variance if variance > 0 else 0.0
    return transform, TransformRecord(step=step, nmse=nmse, components=components)


def _coordinates(unit: Quantiser, values_NH: torch.Tensor) -> torch.Tensor:
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


def share_rows(rows: int, seq_len: int, width: int) -> tuple[int, int, int]:
    """How many of the first rows fit rotations, tune steps and check errors.

    In small stores a twentieth of the rows, or 128 if that is more: a rotation fitted on fewer tokens costs bits, not
    error, because the step is set on rows that the rotation has not seen.
    """
    measured = -(-_MEASURED_TOKENS // seq_len)
    wanted = -(-_FITTED_PER_COMPONENT * width // seq_len) + 2 * measured
    available = min(rows, wanted, _MOST_ROWS, max(_ENOUGH_ROWS, rows // _ENOUGH_SHARE))
    measured = max(1, min(measured * available // wanted, available // 4))
    return max(1, available - 2 * measured), measured, measured
