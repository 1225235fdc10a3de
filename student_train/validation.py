"""The losses of a student on the rows that are held out of its training.

In: the run and its engine. Out: the mean of every method's loss over all held-out positions, or rows, the same in every
process. Cost: a forward pass over the held-out rows.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from student_train.loader import CacheLoader, TrainingBatch
from student_train.losses.sums import LossSum
from student_train.run import TrainingRun
from teacher_cache.errors import DistillationError


def validation_losses(run: TrainingRun, engine: Any) -> dict[str, float]:
    """Losses by method, as they are now.

    Raises:
        DistillationError: this process, or another one, cannot read its share.
    """
    sums: dict[str, list[LossSum]] = {}
    engine.eval()
    with torch.no_grad(), closing(run.validation_batches()) as batches:
        # pass by pass: engines that cut up the weights need every process in it
        while (batch := _next_together(run, batches)) is not None:
            if not batch.row_ids:
                engine(run.stand_in)
                continue
            for name, part in engine(batch.views).items():
                sums.setdefault(name, []).append(part)
    engine.train()
    return {name: _mean(run, sums.get(name, [])) for name in run.objective.methods}


def _next_together(run: TrainingRun, batches: CacheLoader) -> TrainingBatch | None:
    batch, failure = None, None
    try:
        batch = next(batches, None)
    except DistillationError as error:
        failure = error
    run.ranks.end_if_failed(failure, run.ranks.gather(None if failure is None else str(failure)))
    return batch


def _mean(run: TrainingRun, parts: list[LossSum]) -> float:
    """The mean over all positions, or rows, of all parts: a short last batch weighs as much as it holds."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for part in parts:
        sums += torch.stack([part.total.double(), part.count.double()])
    total, count = run.ranks.add_up(sums).tolist()
    return float(total / max(count, 1))
