"""Which tokens of a stream are *sinks*: few, far from all others, and owners of its variance.

Many Transformers gather attention in a few tokens, often the first of a row or a separator, whose hidden states are
hundreds of times larger than others ("massive activations", Sun et al., COLM 2024). A mean, a rotation or a step that
is found with them is theirs, and an error that is a share of the variance says nothing of the other tokens, which are
the ones to learn from. So an `nmse` codec keeps sinks as they are, beside its codes, and is about *ordinary* tokens.

The rule has no unit. A token is far if it is ten times as far from the middle as the median token: its squared
distance is 100 times as large. Far tokens are sinks where they own more than a twentieth of the variance; with less,
the error of ordinary tokens is within a twentieth of the declared one, and the stream stays as it is. Where more than
an eighth of the tokens are far they are no exceptions, and there is nothing ordinary to speak of.

Measured: sinks of a Llama of 30 layers (SmolLM2-135M) are 400 to 60,000 times as far (squared) as the median token in
layers 15 to 29. In a BERT of 6 layers no token of the first five is beyond 1.5 times, and of the last one, which has a
few components of large variance, beyond 45 times. Pure functions of tensors. Shapes: N tokens, D components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.contract.manifest import SinkRecord
from teacher_cache.errors import TeacherError

FAR = 100.0
"""Squared distance of a sink, in units of that of the median token: the least."""
OWNED = 0.05
"""Share of the variance that far tokens must own to be kept apart."""
FEW = 1 / 8
"""Share of the tokens that may be far."""
_HALF = 32_752
"""Half of the largest float16: sinks of rows to come may be somewhat larger than those of the sample."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where ordinary tokens are: around `centre_D`, the median token at a squared distance of `typical`."""

    centre_D: torch.Tensor
    typical: float

    @classmethod
    def of(cls, values_ND: torch.Tensor) -> Self:
        """Of a sample that may hold sinks: medians do not move with a few tokens, however far these are."""
        centre_D = values_ND.median(dim=0).values
        return cls(centre_D=centre_D, typical=float(squared_distance(values_ND, centre_D).median()))

    @property
    def squared_limit(self) -> float:
        """Squared distance beyond which a token is far; infinite where half of the tokens are the same."""
        return FAR * self.typical if self.typical > 0 else float("inf")

    def far(self, values_ND: torch.Tensor) -> torch.Tensor:
        """[N]: True at far tokens."""
        return squared_distance(values_ND, self.centre_D) > self.squared_limit


def squared_distance(values_ND: torch.Tensor, centre_D: torch.Tensor) -> torch.Tensor:
    """||x - c||^2 of each token [N]."""
    return (values_ND - centre_D).square().sum(dim=1)


def describe_sinks(
    surroundings: Surroundings, *, tokens: int, far: int, total: float, ordinary: float, largest: float
) -> SinkRecord | None:
    """The record of a stream's sinks; None where its far tokens are none.

    Args:
        surroundings: where its ordinary tokens are.
        tokens: how many tokens were looked at.
        far: how many of them are far.
        total: the variance of all tokens, E||x - mean||^2.
        ordinary: the variance of those that are not far.
        largest: the magnitude of the largest component of a far token.
    """
    share = far / max(1, tokens)
    if not far or share > FEW:
        return None
    owned = 1 - (1 - share) * ordinary / total
    if not owned > OWNED:
        return None
    dtype: Literal["float16", "float32"] = "float16" if largest <= _HALF else "float32"
    return SinkRecord(distance=surroundings.squared_limit**0.5, share=share, variance=min(owned, 1.0), dtype=dtype)


def store_sinks(values_SD: torch.Tensor, record: SinkRecord) -> NDArray[np.floating]:
    """Sinks as they are stored.

    Raises:
        TeacherError: a value is not finite, or beyond the largest half-precision number, 65504.
    """
    stored = values_SD.float().to(getattr(torch, record.dtype))
    if not bool(torch.isfinite(stored).all()):
        largest = float(values_SD.abs().max())
        raise TeacherError(
            f"the teacher gave a token far from all others that {record.dtype} cannot hold (largest magnitude "
            f"{largest:g}), and the calibration sample had none like it: an infinite target would ruin training; "
            "check the checkpoint, use --dtype float32 if the teacher overflows in half precision, raise --max-rows if "
            "calibration had few rows, or use --precision int8, in another --out if blocks are written already"
        )
    return np.asarray(stored.cpu().numpy())


def describe_kept(sinks: SinkRecord | None) -> str:
    """What the user should know of a stream's sinks; nothing where there are none."""
    if sinks is None:
        return ""
    return (
        f" of ordinary tokens; {sinks.share:.2%} of the tokens, which own {sinks.variance:.0%} of the variance, are "
        f"kept in {sinks.dtype}"
    )
