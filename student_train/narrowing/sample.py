"""Rows of a cache on which a narrower student is fitted.

A few thousand tokens say what the teacher's hidden states look like; more of them change little (see `benchmarks/`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_TOKENS = 16_384
"""At most so many positions, padding among them."""
_BATCH_TOKENS = 2_048


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Token ids of some rows, which positions hold a token of the row, and which of those were masked."""

    input_ids_BT: Tensor
    real_BT: Tensor
    masked_BT: Tensor

    def batches(self) -> list[TokenSample]:
        """The same rows, a few at a time."""
        rows = max(1, _BATCH_TOKENS // self.input_ids_BT.shape[1])
        parts = zip(self.input_ids_BT.split(rows), self.real_BT.split(rows), self.masked_BT.split(rows), strict=True)
        return [TokenSample(input_ids_BT=ids, real_BT=real, masked_BT=masked) for ids, real, masked in parts]

    @property
    def tokens(self) -> int:
        """Positions that hold a token."""
        return int(torch.count_nonzero(self.real_BT))
