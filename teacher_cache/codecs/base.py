"""What every codec of vectors takes and gives, and which values none of them can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import TeacherError

if TYPE_CHECKING:
    import torch


Coded = Mapping[str, NDArray[np.generic]]
"""The arrays of one coded stream by name. Tokens are along the last axis, or rows of tokens along the first one."""


@dataclass(frozen=True, kw_only=True)
class CodedArraySpec:
    """One array that a codec writes: `components` values per token (None: one number per token, without that axis).

    With a `row_shape`, the array has not tokens along its last axis but whole rows of them along its first, each of
    this shape. An array without a `name` is the only one of its stream and has the stream's own path.
    """

    name: str
    dtype: str
    components: int | None
    row_shape: tuple[int, ...] | None = None


class VectorCodec(Protocol):
    """What the store needs of a codec."""

    name: str

    def arrays(self, width: int) -> tuple[CodedArraySpec, ...]:
        """The arrays that `encode` returns for vectors of `width` components."""

    def encode(self, values_ND: torch.Tensor) -> Coded:
        """Code float vectors [N, D]."""

    def decode(self, coded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Float32 vectors [N, D] from coded tensors, which may lie on any device."""

    def error_bound_ND(self, values_ND: torch.Tensor) -> torch.Tensor:
        """Largest possible distance of each decoded component from `values_ND`."""


def refuse_infinite(values: torch.Tensor) -> None:
    """Refuse what no codec can hold.

    Raises:
        TeacherError: a value is not finite.
    """
    import torch

    if not bool(torch.isfinite(values).all()):
        raise TeacherError(
            "the teacher gave infinite or undefined values: they would ruin training; check the checkpoint, or use "
            "--dtype float32 if the teacher overflows in half precision"
        )
