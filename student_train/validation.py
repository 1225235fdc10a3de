"""The losses of a student on the rows that are held out of its training.

In: the run and its engine. Out: the mean of every method's loss over all held-out positions, or rows, the same in every
process. Cost: a forward pass over the held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch

from student_train.losses.sums import LossSum
from student_train.run import TrainingRun
from teacher_cache.errors import TrainingError


def validation_losses(run: TrainingRun, engine: Any, *, step: int) -> dict[str, float]:
    """Losses by method after `step` steps.

    Raises:
        TrainingError: one of them is NaN or infinite, and so are weights of the student.
        DistillationError: the cache cannot be read.
    """
    sums: dict[str, list[LossSum]] = {}
    engine.eval()
    with run.ranks.together(), torch.no_grad(), closing(run.validation_batches()) as batches:
        for batch in batches:
            if not batch.views:
                # the others are in their pass: engines that cut up the weights need this process in it
                engine(run.stand_in)
                continue
            for name, part in engine(batch.views).items():
                sums.setdefault(name, []).append(part)
    engine.train()
    losses = {name: _mean(run, sums.get(name, [])) for name in run.objective.methods}
    if not all(map(math.isfinite, losses.values())):
        raise _not_finite(step, losses)
    return losses


def _mean(run: TrainingRun, parts: list[LossSum]) -> float:
    """The mean over all positions, or rows, of all parts: a short last batch weighs as much as it holds."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for part in parts:
        sums += torch.stack([part.total.double(), part.count.double()])
    total, count = run.ranks.add_up(sums).tolist()
    return float(total / max(count, 1))


def _not_finite(step: int, losses: Mapping[str, float]) -> TrainingError:
    advice = "start anew with a lower --lr or a longer --warmup"
    if step == 0:
        advice = "nothing is trained yet, so look at the weights that --student or --init names, and at the cache"
    return TrainingError(
        f"the validation loss after step {step} is not a finite number ({in_words(losses)}): the student's weights "
        f"are of no use any more, so they were neither saved nor exported; {advice}"
    )


def in_words(losses: Mapping[str, float]) -> str:
    """Losses for a message, every digit of them."""
    return ", ".join(f"{name} {value!r}" for name, value in losses.items())
