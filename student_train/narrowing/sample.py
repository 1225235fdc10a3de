"""Rows of a cache on which a narrower student is fitted.

Only token ids are read: the teacher, which is loaded for its weights, computes what is needed of them. So every cache
will do, whatever its targets, and every layer of the teacher can be fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.split import Rows, count_rows, share_out
from teacher_cache.batch import TargetRequest, concatenate
from teacher_cache.pool import CacheSource

SAMPLE_TOKENS = 16_384
"""At most so many positions are read, padding among them (but one row at least)."""
_BATCH_TOKENS = 2_048


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Token ids of some rows and which positions hold a token. A student is fitted on the device that they are on."""

    input_ids_BT: Tensor
    real_BT: Tensor

    def batches(self) -> list[TokenSample]:
        """The same rows, a few at a time."""
        rows = max(1, _BATCH_TOKENS // self.input_ids_BT.shape[1])
        parts = zip(self.input_ids_BT.split(rows), self.real_BT.split(rows), strict=True)
        return [TokenSample(input_ids_BT=ids_BT, real_BT=real_BT) for ids_BT, real_BT in parts]

    @property
    def tokens(self) -> int:
        """How many positions hold a token."""
        return int(torch.count_nonzero(self.real_BT))


def read_sample(source: CacheSource, rows: Rows, *, with_mlm_head: bool, device: str | torch.device) -> TokenSample:
    """The first of `rows`, of every store its share: they are shuffled already.

    A student with a masked-LM head gets rows of the masked view, if there is one: that is what it will read.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    seq_len = source.manifest.seq_len
    count = min(count_rows(rows), max(1, SAMPLE_TOKENS // seq_len))
    masked = with_mlm_head and "masked" in source.manifest.targets.views()
    pieces = []
    for run, share in zip(rows, share_out(count, [len(run) for run in rows]), strict=True):
        if share:
            batch = source.read_rows(run.start, run.start + share, TargetRequest(masked=masked), device=device)
            pieces.append(next(iter(batch.values())))
    targets = concatenate(pieces)
    return TokenSample(input_ids_BT=targets.input_ids_BT.long(), real_BT=targets.real_BT())
