"""What a training would take, from its first steps: nothing is written, and the student is thrown away.

In: the settings of a training. Out: an `Estimate`. Everything is prepared and checked as for the training itself, so
what a training refuses is refused here. Cost: the preparation, and `STEPS` steps on the first batches.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from student_train.data.split import block_pieces, count_rows
from student_train.engine.checkpoint import KEPT
from student_train.engine.engine import running_engine
from student_train.engine.memory import OF_TRAINING, explain_memory_errors
from student_train.engine.ranks import join_ranks
from student_train.settings import TrainSettings
from student_train.train.feed import Feed
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import Progress
from student_train.train.prepare import TrainingRun
from student_train.train.train import prepare
from teacher_cache.device import choose_device_type, most_memory

STEPS = 3
_FORWARD_SHARE = 1 / 3
"""Of a step's time, what a validation of as many rows takes: it has no backward pass, which costs twice the forward."""
_CHECKPOINT_BYTES = 12
"""Of each trained parameter: itself and Adam's two moments in float32."""
_WEIGHT_BYTES = 4
"""Of a parameter in the student that is exported."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a whole training: `step_seconds` is the median of the steps after the first, `wait_share` the data's part.

    `memory_bytes` is the most that this process, or its GPU, has had. `tokens` are those of all steps. `read_objects`,
    of `read_bytes`, are those of the cache that a process reads, one request each where they lie in a bucket, and
    again in each epoch unless they are kept. `step_flops` are the floating-point operations of one step in one process,
    where they were counted.
    """

    steps: int
    parameters: int
    trained_parameters: int
    step_seconds: float
    wait_share: float
    tokens_per_second: float
    training_seconds: float
    memory_bytes: int
    checkpoint_bytes: int
    tokens: int
    student_bytes: int
    read_objects: int
    read_bytes: int
    step_flops: int | None

    @property
    def disk_bytes(self) -> int:
        """The most that OUT takes: checkpoints, the student, and the best one beside it."""
        return self.checkpoint_bytes + 2 * self.student_bytes

    def seconds_at(self, flops_per_second: float) -> float:
        """The training's time where a step's operations are computed at this rate, and the data keeps up."""
        assert self.step_flops is not None
        return self.training_seconds / self.step_seconds * self.step_flops / flops_per_second

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@explain_memory_errors(OF_TRAINING)
def dry_run(settings: TrainSettings, *, quiet: bool = False, count_flops: bool = False) -> Estimate:
    """Prepare the training, say what it would be (unless `quiet`), and measure its first steps.

    With `count_flops` there is one step more, whose operations are counted.

    Raises:
        DistillationError: the training could not be.
    """
    run, _, progress = prepare(settings, join_ranks(choose_device_type(settings.device)), quiet=quiet)
    warmup = settings.warmup_steps(run.steps)
    with running_engine(run.model, run.config, device=run.device, warmup=warmup, steps=run.steps) as engine:
        try:
            return _measure(run, engine, progress, count_flops=count_flops)
        finally:
            progress.stop()


def _measure(run: TrainingRun, engine: Any, progress: Progress, *, count_flops: bool) -> Estimate:
    state = Progression()
    trainer = Trainer(run, engine, state, None, progress, saves=False)
    progress.start(total=STEPS, step=0)
    seconds = []
    with closing(run.training_batches(0)) as batches:
        feed = Feed(run, batches, [], progress.skipped)
        for _ in range(STEPS):
            started = time.perf_counter()
            trainer.update(feed)
            if run.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            waited = feed.wait_seconds
        tokens = state.tokens / STEPS
        step_flops = _count_flops(trainer, feed) if count_flops else None
        trainer.write_pending()
    step_seconds = statistics.median(seconds[1:])
    validations = 1 + math.ceil(run.steps / run.valid_every)
    validated_steps = validations * count_rows(run.held_out_rows) / run.settings.batch_size
    # whole blocks are read, also where only some rows of one are wanted
    blocks = {rows: len(block_pieces(run.reader.block_bounds, rows)) for rows in (run.training_rows, run.held_out_rows)}
    read_blocks = blocks[run.training_rows] * run.steps * run.settings.batch_size / count_rows(run.training_rows)
    read_blocks += blocks[run.held_out_rows] * validations
    objects, size = run.reader.shards_read(run.objective.request)
    share = read_blocks / (len(run.reader.block_bounds) - 1)
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in run.built.model.parameters())
    return Estimate(
        steps=run.steps,
        parameters=parameters,
        trained_parameters=trained,
        step_seconds=step_seconds,
        wait_share=waited / sum(seconds),
        tokens_per_second=tokens / step_seconds,
        training_seconds=step_seconds * (run.steps + _FORWARD_SHARE * validated_steps),
        memory_bytes=most_memory(run.device),
        checkpoint_bytes=KEPT * _CHECKPOINT_BYTES * trained,
        tokens=round(tokens * run.steps),
        student_bytes=_WEIGHT_BYTES * parameters,
        read_objects=round(share * objects),
        read_bytes=round(share * size),
        step_flops=step_flops,
    )


def _count_flops(trainer: Trainer, feed: Feed) -> int:
    with FlopCounterMode(display=False) as counter:
        trainer.update(feed)
    return int(counter.get_total_flops())
