"""The first rows of a cache: the sample that is read before a training, to fit on and to try a pass with.

Rows are shuffled in the store already. Every process reads the same ones. Cost: blocks are read and checked whole,
decoded are only the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from student_train.data.loader import CacheLoader
from student_train.data.split import RowRanges, count_rows, share_out
from teacher_cache.contract.batch import Batch, TargetRequest, concatenate
from teacher_cache.errors import DamagedStoreError
from teacher_cache.read.pool import CacheSource


@dataclass(frozen=True, kw_only=True)
class FirstRows:
    """The first of `rows`, of every store its share.

    Rows of damaged blocks are passed over with `skip_damaged`, and those after them taken.
    """

    source: CacheSource
    rows: RowRanges
    device: str = "cpu"
    skip_damaged: bool = False

    @property
    def seq_len(self) -> int:
        """Positions of a row, padding among them."""
        return self.source.manifest.seq_len

    def read(self, request: TargetRequest, count: int) -> Batch:
        """The first `count` rows, or all if there are fewer, in one batch.

        Raises:
            DamagedStoreError: see `batches`.
        """
        batches = list(self.batches(request, count, count))
        return {view: concatenate([batch[view] for batch in batches]) for view in batches[0]}

    def batches(self, request: TargetRequest, count: int, at_a_time: int) -> Iterator[Batch]:
        """The same rows, at most `at_a_time` of one store in each batch.

        Raises:
            DamagedStoreError: a block is damaged, with `skip_damaged` every one of the stores that have a share.
        """
        damage: list[str] = []
        found = False
        shares = share_out(min(count, count_rows(self.rows)), [len(run) for run in self.rows])
        for run, lacking in zip(self.rows, shares, strict=True):
            if not lacking:
                continue
            with closing(self._loader(request, run, lacking, at_a_time)) as loader:
                for batch in loader:
                    damage += batch.damage
                    given = min(lacking, len(batch.row_ids))
                    if given:
                        found = True
                        yield batch.part(0, given)
                    lacking -= given
                    if not lacking:
                        break
        if damage and not found:
            raise DamagedStoreError(damage[0])

    def _loader(self, request: TargetRequest, run: range, lacking: int, at_a_time: int) -> CacheLoader:
        return CacheLoader(
            self.source,
            request,
            rows=(run,),
            batch_size=min(at_a_time, lacking),
            seed=None,
            stop=len(run) if self.skip_damaged else lacking,
            device=self.device,
            skip_damaged=self.skip_damaged,
        )
