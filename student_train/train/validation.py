"""The losses of a student on the rows that are held out of its training.

In: the run and its engine. Out: the mean of every method's loss over all held-out positions, or rows, the same in every
process, and how many rows of damaged blocks were left out. Cost: a forward pass over the held-out rows.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from student_train.data.split import count_rows
from student_train.losses.sums import LossSum
from student_train.train.feed import TellSkipped, next_share
from student_train.train.prepare import TrainingRun
from teacher_cache.errors import StoreError, TrainingError


def validation_losses(run: TrainingRun, engine: Any, tell_skipped: TellSkipped) -> tuple[dict[str, float], int]:
    """Losses by method, as they are now, and how many rows were left out; `tell_skipped` is told of damaged blocks.

    Raises:
        DistillationError: this process, or another one, cannot read its share, no held-out row can be read at all, or
            the held-out rows have no place for one of the methods.
    """
    sums: dict[str, list[LossSum]] = {}
    left_out = 0
    engine.eval()
    with torch.no_grad(), closing(run.validation_batches()) as batches:
        # pass by pass: engines that cut up the weights need every process in it
        while (share := next_share(run.ranks, batches, tell_skipped, received=[])) is not None:
            left_out += share.left_out
            if not share.batch.row_ids:
                engine(run.stand_in)
                continue
            for name, part in engine(share.batch.views).items():
                sums.setdefault(name, []).append(part)
    engine.train()
    if left_out == count_rows(run.held_out_rows):
        raise StoreError(
            f"none of the {left_out} held-out rows of {run.reader.path} can be read, every block that holds one is "
            "damaged or gone: a better student could not be told from a worse one; restore the cache, or hold out more "
            "rows with --valid-share in another --out"
        )
    return {name: _mean(run, name, sums.get(name, [])) for name in run.objective.methods}, left_out


def _mean(run: TrainingRun, name: str, parts: list[LossSum]) -> float:
    """The mean over all positions, or rows, of all parts: a short last batch weighs as much as it holds."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for part in parts:
        sums += torch.stack([part.total.double(), part.count.double()])
    total, count = run.ranks.add_up(sums).tolist()
    if not count:
        why = "none of their tokens could be masked, as where the tokenizer knows nothing of the text"
        if run.reader.manifest.teacher.causal:
            why = "after none of their positions is a distribution kept, as where --positions left few of short rows"
        raise TrainingError(
            f"the held-out rows of {run.reader.path} have no place for --method {name}: {why}, and a loss of nothing "
            "would be 0 for any student; hold out more rows with --valid-share in another --out, or build the cache "
            "from other text"
        )
    return float(total / count)
