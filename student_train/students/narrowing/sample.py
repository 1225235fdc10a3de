"""Rows of a cache on which a narrower student is fitted.

Only token ids are read: the teacher, which is loaded for its weights, computes what is needed of them. So every cache
will do, whatever its targets, and every layer of the teacher can be fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.data.first_rows import FirstRows
from teacher_cache.contract.batch import TargetRequest

SAMPLE_TOKENS = 16_384
"""At most so many positions are read, padding among them (but one row at least)."""
_BATCH_TOKENS = 2_048


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Token ids of some rows and which positions hold a token. A student is fitted on the device that they are on.

    `starts_BT` is True where a document begins, in rows of decoders whose documents do not see each other.
    """

    input_ids_BT: Tensor
    real_BT: Tensor
    starts_BT: Tensor | None = None

    def batches(self) -> list[TokenSample]:
        """The same rows, a few at a time."""
        rows = max(1, _BATCH_TOKENS // self.input_ids_BT.shape[1])
        starts = [None] * len(self.input_ids_BT) if self.starts_BT is None else self.starts_BT.split(rows)
        parts = zip(self.input_ids_BT.split(rows), self.real_BT.split(rows), starts, strict=False)
        return [TokenSample(input_ids_BT=ids_BT, real_BT=real_BT, starts_BT=each) for ids_BT, real_BT, each in parts]

    def to(self, device: torch.device) -> TokenSample:
        """The same rows on a device."""
        starts_BT = None if self.starts_BT is None else self.starts_BT.to(device)
        return TokenSample(
            input_ids_BT=self.input_ids_BT.to(device), real_BT=self.real_BT.to(device), starts_BT=starts_BT
        )

    @property
    def tokens(self) -> int:
        """How many positions hold a token."""
        return int(torch.count_nonzero(self.real_BT))


def read_sample(first_rows: FirstRows, *, with_mlm_head: bool) -> TokenSample:
    """Some rows to train on.

    A student with a head gets rows of the masked view, if there is one: that is what it will read.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    masked = with_mlm_head and "masked" in first_rows.source.manifest.targets.views()
    batch = first_rows.read(TargetRequest(masked=masked), max(1, SAMPLE_TOKENS // first_rows.seq_len))
    targets = next(iter(batch.values()))
    starts_BT = targets.starts_BT if first_rows.source.manifest.teacher.causal else None
    return TokenSample(input_ids_BT=targets.input_ids_BT.long(), real_BT=targets.real_BT(), starts_BT=starts_BT)
