"""The next batch of a training: this process's share of it, and what all processes agree on about it.

Before each step they tell each other, from host to host, how many positions their shares hold, whether one of them was
asked to stop, and whether one cannot read its share: then all stop there. Rows of damaged blocks, where they are to be
skipped, are counted over all processes; a batch of which nothing is left is passed over without a step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from student_train.data.loader import CacheLoader, TrainingBatch, WaitingEnded
from student_train.data.split import count_rows
from student_train.train.prepare import TrainingRun
from teacher_cache.errors import DistillationError, StoreError


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of a batch; `counts` and `left_out` (rows of damaged blocks) are those of the whole batch.

    `end` is the number of rows of the stream up to the end of the batch.
    """

    batch: TrainingBatch
    counts: dict[str, int]
    left_out: int
    end: int


class Feed:
    """Shares of one batch after the other; `tell_skipped` is told of damaged blocks, every time one is met."""

    def __init__(
        self,
        run: TrainingRun,
        batches: CacheLoader,
        received: list[signal.Signals],
        tell_skipped: Callable[[Sequence[str]], None],
    ) -> None:
        self._run, self._batches, self._received, self._tell_skipped = run, batches, received, tell_skipped
        batches.stop_waiting = lambda: bool(received)
        self._missed = 0

    @property
    def wait_seconds(self) -> float:
        """How long this process has waited for the cache."""
        return self._batches.wait_seconds

    def next(self) -> Share | None:
        """The next share, or None if any process was asked to stop, and the list of signals says so then in all.

        Raises:
            DistillationError: a process cannot read its share, or nothing of a whole epoch can be read.
        """
        left_out = 0
        while True:
            share = self._next_batch(left_out)
            if share is None or share.counts["rows"] > 0:
                self._missed = 0
                return share
            left_out = share.left_out
            self._missed += self._run.settings.batch_size
            if self._missed >= count_rows(self._run.training_rows):
                raise StoreError(
                    f"no row of {self._run.reader.path} to train on can be read, every block that holds one is "
                    "damaged or gone: there is nothing to go on with; restore the cache, then give --resume auto"
                )

    def _next_batch(self, left_out: int) -> Share | None:
        batch, failure, ranks = None, None, self._run.ranks
        if not self._received:
            try:
                batch = next(self._batches)
            except WaitingEnded:
                batch = None  # a signal has come
            except DistillationError as error:
                failure = error
        own: tuple[Any, ...] = (
            None if failure is None else str(failure),
            batch and (batch.counts, batch.left_out, batch.damage),
            self._received[0] if self._received else None,
        )
        messages, found, signals = zip(*ranks.gather(own), strict=True)
        ranks.end_if_failed(failure, messages)
        asked = [number for number in signals if number is not None]
        if asked:
            self._received[:] = self._received or asked[:1]
            return None
        # a signal that has come since is told before the next batch
        assert batch is not None
        for _, _, damage in found:
            self._tell_skipped(damage)
        return Share(
            batch=batch,
            counts={name: sum(counts[name] for counts, _, _ in found) for name in batch.counts},
            left_out=left_out + sum(rows for _, rows, _ in found),
            end=batch.position + self._run.settings.batch_size,
        )
