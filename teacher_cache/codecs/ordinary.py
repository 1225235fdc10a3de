"""Does the declared error of a stream hold for nine tenths of its tokens by themselves?

The error of an `nmse` codec is a share of the variance over all tokens that it codes. Those that would own it are kept
apart (`sinks.py`), but only where they are few and far from all others. Where a tenth of the tokens owns the variance
without that, one step for all leaves little of the others, and the error over all of them does not say so. Here it is
measured. Pure functions of tensors. Shapes: N tokens, H width of what the teacher gives, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teacher_cache.codecs.nmse import Quantiser, Transform
from teacher_cache.contract.manifest import SinkRecord
from teacher_cache.models.attention import AttentionProjections

_ORDINARY_SHARE = 0.9
_TIMES_THE_TARGET = 2.0
"""Ordinary tokens vary a little less than all of them, so that they lose a little more than the share asked for."""


@dataclass(frozen=True, kw_only=True)
class OrdinaryTokens:
    """The nine tenths of the tokens that are nearest to the mean.

    `error` is what they lose, as a share of their own variance; `variance_outside` is the share of the variance of all
    tokens that lies in the tenth that is left out.
    """

    error: float
    variance_outside: float

    def note(self, path: str, target: float) -> str | None:
        """What has to be said of a stream that was to lose the share `target`; None where all is well."""
        if self.error <= _TIMES_THE_TARGET * target:
            return None
        return (
            f"  {path}: {self.variance_outside:.0%} of the variance lies in a tenth of the tokens, and all others lose "
            f"{min(self.error, 1.0):.0%} of their own variance, not {target:.1%}: what is kept of them is too little "
            "to learn from; keep this target with --precision int8 or float16, in another --out"
        )


def measure_ordinary(
    values_NH: torch.Tensor,
    transform: Transform,
    projections: AttentionProjections | None,
    sinks: SinkRecord | None = None,
) -> OrdinaryTokens:
    """The error of ordinary tokens among these, coded by this transform; those kept apart do not count at all."""
    quantiser = Quantiser(transform, projections, sinks)
    if (apart_N := quantiser.find_sinks(values_NH)) is not None:
        values_NH = values_NH[~apart_N]
    # in units of the step, where codes are whole numbers
    exact_NK = torch.addmm(quantiser.offset_K1.T, values_NH.float(), quantiser.weight_KH.T).double()
    lost_N = (exact_NK - exact_NK.round()).square().sum(dim=1)
    distance_N = (exact_NK - exact_NK.mean(dim=0)).square().sum(dim=1)
    nearest = distance_N.argsort()[: max(1, int(len(distance_N) * _ORDINARY_SHARE))]
    ordinary_NK = exact_NK[nearest]
    own = float((ordinary_NK - ordinary_NK.mean(dim=0)).square().sum())
    return OrdinaryTokens(
        error=float(lost_N[nearest].sum()) / own if own > 0 else 0.0,
        variance_outside=1 - float(distance_N[nearest].sum() / distance_N.sum().clamp_min(1e-300)),
    )
