"""From settings to a student: prepare, train, export.

One run at a time may write into OUT: the first process holds the folder's lock. What appears there: `metrics.jsonl`,
`tensorboard/` and `checkpoints/` during the training, and at its end the student as a Hugging Face directory with
`provenance.json`. A run that a signal stopped leaves a checkpoint and exports nothing; a student that was exported
there before stays.

Of several processes each goes through all of it with its share of the rows; the first one writes, all but its part of
a checkpoint, and tells. Where one fails, all end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from student_train.engine.checkpoint import drop_beyond, load_checkpoint, read_marker
from student_train.engine.engine import full_precision_weights, running_engine
from student_train.engine.memory import OF_TRAINING, explain_memory_errors
from student_train.engine.ranks import Ranks, join_ranks
from student_train.engine.universal import READ_UNIVERSAL, needs_universal, own_groups, universal_form
from student_train.out_folder import RUN_LOCK, explain_write_errors, hold_folder
from student_train.settings import TrainSettings
from student_train.train.best import drop_best, match_best, write_student
from student_train.train.describe import describe_run
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import MetricsLog, Progress
from student_train.train.prepare import TrainingRun, prepare_run
from student_train.train.resume import find_start
from student_train.train.weights_and_biases import WeightsAndBiases, check_installed
from teacher_cache.device import choose_device_type
from teacher_cache.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out. `stopped_by` is the signal that ended the run early: a checkpoint is saved, nothing exported."""

    out: str
    steps: int
    tokens: int
    valid: Mapping[str, float]
    best_step: int
    seconds: float
    stopped_by: int | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@explain_memory_errors(OF_TRAINING)
def train(settings: TrainSettings, *, quiet: bool = False) -> TrainResult:
    """Train a student as the settings say and export it; what happens is told on standard error, unless `quiet`.

    Raises:
        DistillationError: something asked for cannot be, the cache cannot be read, OUT cannot be written, or a loss is
            NaN or infinite.
    """
    ranks = join_ranks(choose_device_type(settings.device))
    with ExitStack() as held:
        with ranks.together():
            if ranks.first:
                held.enter_context(hold_folder(Path(settings.out), RUN_LOCK))
        return _train(settings, ranks, quiet)


def _train(settings: TrainSettings, ranks: Ranks, quiet: bool) -> TrainResult:
    started = time.perf_counter()
    run, checkpoint, progress = prepare(settings, ranks, quiet=quiet)
    state, stopped_by, weights = Progression(), None, None
    with ranks.together(), explain_write_errors(Path(settings.out)):
        Path(settings.out).mkdir(parents=True, exist_ok=True)
    if run.steps > 0:
        state, stopped_by, weights = _train_with_engine(run, checkpoint, progress)
    if stopped_by is None:
        with ranks.together():
            if ranks.first:
                write_student(run, weights, Path(settings.out), result=asdict(state))
                if state.best_step == state.step:
                    drop_best(run)
    return TrainResult(
        out=settings.out,
        steps=state.step,
        tokens=state.tokens,
        valid=state.valid,
        best_step=state.best_step,
        seconds=time.perf_counter() - started,
        stopped_by=stopped_by,
    )


def prepare(settings: TrainSettings, ranks: Ranks, *, quiet: bool = False) -> tuple[TrainingRun, Path | None, Progress]:
    """Prepare the run and say what it is; with the checkpoint to go on from, if there is one.

    Raises:
        DistillationError: something asked for cannot be, in this process or another; nothing has been written.
    """
    progress = Progress(quiet=quiet or not ranks.first)
    with ranks.together():
        if settings.wandb is not None:
            check_installed(settings.wandb)
        checkpoint = find_start(settings, progress.say)
    found = ranks.gather(None if checkpoint is None else str(checkpoint))
    if len(set(found)) > 1:
        raise TrainingError(
            f"the processes would not go on from the same checkpoint ({', '.join(map(str, found))}): each would train "
            f"another student; --out {settings.out!r} must be a folder that all of them see"
        )
    with ranks.together():
        run = prepare_run(settings, ranks, fresh=checkpoint is None)
        if checkpoint is not None:
            run.check_same(checkpoint)
    for line in describe_run(run):
        progress.say(line)
    return run, checkpoint, progress


def _train_with_engine(
    run: TrainingRun, checkpoint: Path | None, progress: Progress
) -> tuple[Progression, signal.Signals | None, Mapping[str, Any] | None]:
    """How far it came, the signal that stopped it, and the weights at its end; only the first process's are of use."""
    ranks, state = run.ranks, Progression()
    written_by = ranks.count if checkpoint is None else read_marker(checkpoint).processes
    converts = needs_universal(run.config, written_by, ranks)
    config = run.config | (READ_UNIVERSAL if converts else {})
    warmup = run.settings.warmup_steps(run.steps)
    with running_engine(run.model, config, device=run.device, warmup=warmup, steps=run.steps) as engine:
        if checkpoint is not None:
            with (
                universal_form(checkpoint, ranks) if converts else nullcontext() as universal,
                own_groups(engine),
                ranks.together(),
            ):
                saved = load_checkpoint(engine, checkpoint, ranks, universal=universal)
                state = Progression(**saved["progression"])
                run.objective.restore_adaptation(saved["adaptation"])
            progress.say(f"resumed  {checkpoint} after step {state.step}")
        with ranks.together():
            log = _open_log(run, checkpoint, state)
            best_is_kept = ranks.first and match_best(run, state.best_step)
        if not ranks.gather(best_is_kept)[0]:
            _forget_lost_best(run, state)
        try:
            stopped_by = Trainer(run, engine, state, log, progress).fit()
        finally:
            progress.stop()
            if log is not None:
                log.close()
        weights = full_precision_weights(run.built.model) if stopped_by is None else None
    return state, stopped_by, weights


def _forget_lost_best(run: TrainingRun, state: Progression) -> None:
    """Where the best student so far is not kept any more, let the next one be the best: one of them has to be there.

    The untrained student never was kept, and the one of the last step is what is exported.
    """
    if 0 < state.best_step < run.steps:
        state.best_valid_loss, state.best_step = None, 0


def _open_log(run: TrainingRun, checkpoint: Path | None, state: Progression) -> MetricsLog | None:
    """The records of a run that goes on from `checkpoint`, with nothing left from beyond it; the first process's."""
    if not run.ranks.first:
        return None
    out, project = Path(run.settings.out), run.settings.wandb
    drop_beyond(out, state.step)
    log = MetricsLog(out, last_step=None if checkpoint is None else state.step)
    if project is not None:
        log.also_to(WeightsAndBiases(project, out, run.identity(), resumed=checkpoint is not None))
    return log
