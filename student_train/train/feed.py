"""The next batch: this process's share of it, and what all processes agree on about it.

Before each step they tell each other, from host to host, how many positions their shares hold, whether one of them was
asked to stop, and whether one cannot read its share: then all stop there. Rows of damaged blocks, where they are to be
skipped, are counted over all processes; a batch of which nothing is left is passed over without a step. Validations
get their batches by the same rule, but no signal stops them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_train.data.loader import CacheLoader, TrainingBatch, WaitingEnded
from student_train.data.split import count_rows
from student_train.engine.ranks import Ranks
from student_train.train.prepare import TrainingRun
from teacher_cache.errors import DistillationError, StoreError

TellSkipped = Callable[[Sequence[str]], None]
"""Told what is wrong with the damaged blocks of a batch, every time one is met."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of a batch. `counts` and `left_out` (rows of damaged blocks) are of the whole batch."""

    batch: TrainingBatch
    counts: dict[str, int]
    left_out: int


def next_share(
    ranks: Ranks, batches: CacheLoader, tell_skipped: TellSkipped, received: list[signal.Signals]
) -> Share | None:
    """The next share, once every process has its own; None where there is no further batch or one was asked to stop.

    Args:
        ranks: this process among the others.
        batches: this process's shares.
        tell_skipped: told of the damaged blocks of all processes.
        received: the signals that asked this process to stop. If another one was asked, its signal is added here.

    Raises:
        DistillationError: a process cannot read its share.
    """
    batch, failure = None, None
    if not received:
        try:
            batch = next(batches, None)
        except WaitingEnded:
            batch = None  # a signal has come
        except DistillationError as error:
            failure = error
    own: tuple[Any, ...] = (
        None if failure is None else str(failure),
        batch and (batch.counts, batch.left_out, batch.damage),
        received[0] if received else None,
    )
    messages, found, signals = zip(*ranks.gather(own), strict=True)
    ranks.end_if_failed(failure, messages)
    asked = [number for number in signals if number is not None]
    if asked:
        received[:] = received or asked[:1]
        return None
    # a signal that has come since is told before the next batch
    if batch is None:
        return None
    for _, _, damage in found:
        tell_skipped(damage)
    return Share(
        batch=batch,
        counts={name: sum(counts[name] for counts, _, _ in found) for name in batch.counts},
        left_out=sum(rows for _, rows, _ in found),
    )


class Feed:
    """Shares of one batch after the other."""

    def __init__(
        self, run: TrainingRun, batches: CacheLoader, received: list[signal.Signals], tell_skipped: TellSkipped
    ) -> None:
        self._run, self._batches, self._received, self._tell_skipped = run, batches, received, tell_skipped
        batches.stop_waiting = lambda: bool(received)
        self._missed = 0

    @property
    def wait_seconds(self) -> float:
        """How long this process has waited for the cache."""
        return self._batches.wait_seconds

    def next(self) -> Share | None:
        """The next share that is not empty, or None if any process was asked to stop; the list of signals says it then.

        The rows left out of batches that were passed over count with this one.

        Raises:
            DistillationError: a process cannot read its share, or nothing of a whole epoch can be read.
        """
        left_out = 0
        while True:
            share = next_share(self._run.ranks, self._batches, self._tell_skipped, self._received)
            if share is None:
                return None
            left_out += share.left_out
            if share.counts["rows"] > 0:
                self._missed = 0
                return replace(share, left_out=left_out)
            self._missed += self._run.settings.batch_size
            if self._missed >= count_rows(self._run.training_rows):
                raise StoreError(
                    f"no row of {self._run.reader.path} to train on can be read, every block that holds one is "
                    "damaged or gone: there is nothing to go on with; restore the cache, then give --resume auto"
                )
