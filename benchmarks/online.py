"""Distillation without a cache, to compare with: the teacher computes its targets in every step.

Student, batches, their order, engine and losses are those of `kdtrain`. Of the store only the token ids are read (and,
where the student has no layers of the teacher, the rows that its maps are fitted on). For the methods that learn hidden
states or attention of unmasked rows: mha, direct and hs.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from train import load_teacher, taught

from student_train.data.loader import CacheLoader
from student_train.engine.engine import full_precision_weights, running_engine
from student_train.methods.projections import FloatLinear
from student_train.settings import TrainSettings
from student_train.train.best import write_student
from student_train.train.feed import Feed
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import Progress
from student_train.train.prepare import TrainingRun, prepare_run
from teacher_cache.contract.batch import TargetRequest


def train_online(settings: TrainSettings) -> list[dict[str, Any]]:
    """Train a student, export it to `settings.out`, and return a record of each step: `seconds`, `tokens` so far."""
    run = prepare_run(settings)
    lead_to_hidden_states(run)
    teacher, warmup = load_teacher(run), settings.warmup_steps(run.steps)
    progress, records, tokens = Progress(), [], 0
    with (
        running_engine(run.model, run.config, device=run.device, warmup=warmup, steps=run.steps) as engine,
        closing(token_ids(run)) as batches,
    ):
        trainer = Trainer(run, engine, Progression(), None, progress)
        feed = Feed(run, batches, [], progress.skipped)
        for _ in range(run.steps):
            started = time.perf_counter()
            share = feed.next()
            assert share is not None, "nobody sends signals to this feed"
            losses, _ = trainer.backward(taught(run, teacher, share))
            sum(losses.values()).item()  # waits for the device
            tokens += share.counts["positions"]
            records.append({"seconds": time.perf_counter() - started, "tokens": tokens})
        weights = full_precision_weights(run.built.model)
    write_student(run, weights, Path(settings.out), result={"step": run.steps, "tokens": tokens, "online": True})
    return records


def lead_to_hidden_states(run: TrainingRun) -> None:
    """Let the maps of `hs` give what the teacher gives, not the coordinates in which the cache holds it."""
    for linear in run.objective.modules():
        if isinstance(linear, FloatLinear):
            linear.rotation = None


def token_ids(run: TrainingRun) -> CacheLoader:
    """The batches of a training without their targets."""
    return CacheLoader(
        run.reader,
        TargetRequest(),
        rows=run.training_rows,
        batch_size=run.settings.batch_size,
        seed=run.settings.seed,
        device=run.device,
    )
