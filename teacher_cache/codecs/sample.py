"""What calibration of an `nmse` stream sees of its tokens: moments of many, values of a few others, and which are far.

Tokens come in parts, as a teacher gives them, and are not kept: memory is that of two covariances, and of the tokens
that steps are tuned and errors are measured on. `nmse.py` makes a transform of a sample, `sinks.py` says what is far.

Shapes: N tokens, H width of what the teacher gives, D components of what is coded.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from teacher_cache.codecs.sinks import Surroundings, describe_sinks
from teacher_cache.contract.manifest import SinkRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import AttentionProjections

_FITTED_PER_COMPONENT = 48
"""Tokens for each component of a covariance: at this number the rotation costs held-out rows about 1% more error."""
_MEASURED_TOKENS = 8192
_MEDIAN_TOKENS = 256
"""Tokens that say where ordinary ones are: among the few of one short row, a sink may be the median."""
_MOST_ROWS, _ENOUGH_ROWS, _ENOUGH_SHARE = 384, 128, 20


def stacked_maps(projections: AttentionProjections | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map from what the teacher gives to what is coded: [W_q; W_k; W_v] with biases, or the identity."""
    if projections is None:
        return torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    maps = [getattr(projections, name) for name in VECTORS]
    return torch.cat([m.weight for m in maps]).double(), torch.cat([m.bias for m in maps]).double()


def coded_vectors(values_NH: torch.Tensor, projections: AttentionProjections | None) -> torch.Tensor:
    """X [N, D] of what the teacher gives, in float32."""
    values_NH = values_NH.float()
    if projections is None:
        return values_NH
    moved = projections.to(values_NH.device)
    maps = [getattr(moved, name) for name in VECTORS]
    return torch.cat([torch.addmm(m.bias, values_NH, m.weight.T) for m in maps], dim=1)


class _Moments:
    """Mean and covariance of tokens that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.shift_H: torch.Tensor | None = None
        self.sum_H: torch.Tensor | float = 0.0
        self.outer_HH: torch.Tensor | float = 0.0

    def add(self, values_NH: torch.Tensor) -> None:
        if not len(values_NH):  # all of a part may be far, and has no mean
            return
        if self.shift_H is None:
            # centred roughly before squaring: a large mean would eat the digits of a small variance
            self.shift_H = values_NH.mean(dim=0)
        shifted_NH = values_NH - self.shift_H
        self.count += len(shifted_NH)
        self.sum_H = self.sum_H + shifted_NH.double().sum(dim=0).cpu()
        self.outer_HH = self.outer_HH + (shifted_NH.T @ shifted_NH).double().cpu()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.shift_H is not None and isinstance(self.sum_H, torch.Tensor)
        mean_H = self.sum_H / self.count
        return mean_H + self.shift_H.double().cpu(), self.outer_HH / self.count - torch.outer(mean_H, mean_H)


class CalibrationSample:
    """What calibration needs of one stream: moments of many tokens, and the values of a few others.

    Moments are taken of all tokens, and from the first one on that is far from the others, of those that are not: which
    of both counts is known when all have been seen.
    """

    def __init__(self, projections: AttentionProjections | None = None) -> None:
        """For a stream that is coded in the metric of these projections."""
        self.projections = projections
        self.tune: list[torch.Tensor] = []
        self.check: list[torch.Tensor] = []
        self._all = _Moments()
        self._near: _Moments | None = None
        self._surroundings: Surroundings | None = None
        self._waiting: list[torch.Tensor] = []
        self._far, self._largest = 0, 0.0

    @property
    def count(self) -> int:
        """How many tokens were fitted."""
        return self._all.count + sum(map(len, self._waiting))

    def fit(self, values_NH: torch.Tensor) -> None:
        """Add tokens to mean and covariance."""
        self._waiting.append(values_NH.float())
        if self._surroundings is not None or self.count >= _MEDIAN_TOKENS:
            self._settled()

    def _settled(self) -> Surroundings:
        """What is far, from the first tokens, with all that were waiting for it added."""
        if self._surroundings is None:
            self._surroundings = Surroundings.of(coded_vectors(torch.cat(self._waiting), self.projections))
        waiting, self._waiting = self._waiting, []
        for values_NH in waiting:
            self._add(values_NH, self._surroundings)
        return self._surroundings

    def _add(self, values_NH: torch.Tensor, surroundings: Surroundings) -> None:
        coded_ND = coded_vectors(values_NH, self.projections)
        far_N = surroundings.far(coded_ND)
        if bool(far_N.any()):
            self._far += int(far_N.sum())
            self._largest = max(self._largest, float(coded_ND[far_N].abs().amax()))
            self._near = deepcopy(self._all) if self._near is None else self._near
        self._all.add(values_NH)
        if self._near is not None:
            self._near.add(values_NH[~far_N])

    def far(self, values_NH: torch.Tensor) -> torch.Tensor:
        """[N]: True at tokens that are sinks if there are any. Ask once something was fitted."""
        return self._settled().far(coded_vectors(values_NH, self.projections))

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [H] and covariance [H, H] of all tokens, float64."""
        self._settled()
        return self._all.result()

    def ordinary(self) -> tuple[int, torch.Tensor, torch.Tensor, SinkRecord | None]:
        """Number, mean and covariance of the tokens that are coded, and what is known of those that are not."""
        surroundings = self._settled()
        everything = (self._all.count, *self._all.result())
        if self._near is None or not self._near.count:
            return *everything, None
        near = (self._near.count, *self._near.result())
        weight_DH, _ = stacked_maps(self.projections, len(near[1]))
        total, ordinary = (total_variance(weight_DH, covariance_HH) for _, _, covariance_HH in (everything, near))
        sinks = describe_sinks(
            surroundings,
            tokens=self._all.count,
            far=self._far,
            total=total,
            ordinary=ordinary,
            largest=self._largest,
        )
        return (*everything, None) if sinks is None else (*near, sinks)


def total_variance(weight_DH: torch.Tensor, covariance_HH: torch.Tensor) -> float:
    """E||x - mean||^2 of what is coded."""
    return float((weight_DH @ covariance_HH * weight_DH).sum())


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
