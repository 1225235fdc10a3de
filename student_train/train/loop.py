"""The training loop: batches from the cache, steps of the engine, records, validations and checkpoints.

Losses are sums over the real positions of the batch, or its rows, divided by their number in the global batch, so that
the result does not depend on how a batch is cut into passes. Reading a loss off the device waits for it, so the record
of a step is written, and checked for NaN, while the next step runs. SIGTERM and Ctrl-C finish the step, save a
checkpoint and end the loop; a second one ends the process at once. A cache that cannot be read any further ends it with
a checkpoint, too.

Several processes go step by step together, with as many passes in each: one without rows left runs a stand-in whose
loss counts nothing.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_train.engine.checkpoint import checkpoint_path, save_checkpoint
from student_train.engine.engine import clip_gradient, skipped_steps
from student_train.losses.sums import LossSum
from student_train.train.best import keep_best
from student_train.train.feed import Feed, Share
from student_train.train.metrics import MetricsLog, Progress
from student_train.train.prepare import TrainingRun
from student_train.train.signals import noted_signals
from student_train.train.validation import validation_losses
from teacher_cache.contract.batch import Batch
from teacher_cache.device import most_memory
from teacher_cache.errors import DistillationError, SpaceError, TrainingError


@dataclass(kw_only=True)
class Progression:
    """How far a run has come; saved with every checkpoint. `rows` were trained on, `skipped_rows` left out."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    rows: int = 0
    skipped_rows: int = 0
    best_valid_loss: float | None = None
    best_step: int = 0
    validated_step: int = -1
    valid: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step left on the device and on the host, not yet waited for.

    `record` is what the host knows of it already; `scaled_away` says that the engine left the step out, because scaled
    losses overflowed.
    """

    step: int
    losses: dict[str, Tensor]
    gradient_norm: Any
    scaled_away: bool
    record: dict[str, Any]
    tokens: int
    row_ids: tuple[int, ...]
    blocks: tuple[int, ...]


class Trainer:
    """One run from where it stands to its last step."""

    def __init__(
        self,
        run: TrainingRun,
        engine: Any,
        state: Progression,
        log: MetricsLog | None,
        progress: Progress,
        *,
        saves: bool = True,
    ) -> None:
        """`saves` says whether what is trained may be written; records are by the process that has a `log`."""
        self.run, self.engine, self.state, self.log, self.progress = run, engine, state, log, progress
        self._saves = saves
        self._pending: StepOutcome | None = None
        self._saved_step = state.step

    def fit(self) -> signal.Signals | None:
        """Train to the last step, or until a signal asks to stop, which it returns; it is saved either way."""
        run, state = self.run, self.state
        self.progress.start(total=run.steps, step=state.step)
        with noted_signals() as received, closing(run.training_batches(state.position)) as batches:
            feed = Feed(run, batches, received, self.progress.skipped)
            self.validate_if_due()
            while state.step < run.steps and self.update(feed):
                self.validate_if_due()
                if state.step % run.settings.save_every == 0:
                    self.save()
            if state.step != self._saved_step:
                self.save()
            # one that came during the last step may have come to one process alone
            asked = [number for number in run.ranks.gather(received[0] if received else None) if number is not None]
        return asked[0] if asked else None

    def update(self, feed: Feed) -> bool:
        """One optimizer step on the next batch, and the record of the step before; False if a signal came instead.

        Raises:
            DistillationError: the batch cannot be read; what is trained is saved.
        """
        started, waited = time.perf_counter(), feed.wait_seconds
        try:
            share = feed.next()
        except DistillationError as error:
            raise self.save_before(error) from error
        if share is None:
            return False
        learning_rate, skipped = self.engine.get_lr()[0], skipped_steps(self.engine)
        losses, norm = self.backward(share)
        state, tokens = self.state, share.counts["positions"]
        state.step += 1
        state.position = share.batch.position + self.run.settings.batch_size
        state.tokens += tokens
        state.rows += share.counts["rows"]
        state.skipped_rows += share.left_out
        self.write_pending()
        self._pending = StepOutcome(
            step=state.step,
            losses=losses,
            gradient_norm=norm,
            scaled_away=skipped_steps(self.engine) > skipped,
            record={
                "lr": learning_rate,
                "tokens": state.tokens,
                "rows": state.rows,
                **({"skipped_rows": state.skipped_rows} if state.skipped_rows else {}),
                "seconds": time.perf_counter() - started,
                "wait": feed.wait_seconds - waited,
                "memory": most_memory(self.run.device),
            },
            tokens=tokens,
            row_ids=share.batch.row_ids,
            blocks=share.batch.blocks,
        )
        return True

    def backward(self, share: Share) -> tuple[dict[str, Tensor], Any]:
        """Gradients of the batch, pass by pass, and the optimizer step. Returns the losses and the gradient's norm."""
        engine, run = self.engine, self.run
        parts: dict[str, Tensor] = {}
        norm = None
        for start in range(0, run.share_rows, run.micro_batch):
            sums = self.forward(share.batch.part(start, start + run.micro_batch))
            losses = {
                name: part.total / max(1, share.counts[run.objective.methods[name].counted])
                for name, part in sums.items()
            }
            # each pass has its share of one sum already: DeepSpeed must not divide by the number of passes, and what it
            # averages over ranks is multiplied again
            loss = self.weighted(losses) * run.ranks.count
            engine.backward(loss, scale_wrt_gas=False)
            if engine.is_gradient_accumulation_boundary():
                norm = clip_gradient(engine, run.config["gradient_clipping"])
            self.engine_step()
            for name, value in losses.items():
                parts[name] = parts.get(name, 0) + value.detach()
        run.objective.finish_step()
        totals = run.ranks.add_up(torch.stack(list(parts.values())))
        parts = dict(zip(parts, totals.unbind(), strict=True))
        return parts, engine.get_global_grad_norm() if norm is None else norm

    def forward(self, views: Batch) -> dict[str, LossSum]:
        """The loss sums of a pass; where this process has no rows left for it, those of a stand-in, times nothing."""
        if views:
            sums: dict[str, LossSum] = self.engine(views)
            return sums
        objective = self.run.objective
        # methods that adapt to what they see must not see it
        objective.eval()
        sums = self.engine(self.run.stand_in)
        objective.train()
        return {name: LossSum(total=part.total * 0.0, count=part.count * 0) for name, part in sums.items()}

    def engine_step(self) -> None:
        """A step of the engine.

        Raises:
            TrainingError: scaled losses overflow however little they are scaled.
        """
        try:
            self.engine.step()
        except Exception as error:
            # DeepSpeed has no class of its own for it
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"gradients overflow float16 in every step up to {self.state.step + 1}, however little the loss is "
                "scaled: no step changes the weights any more; start anew with --dtype bfloat16 or float32, or a "
                "lower --lr"
            ) from error

    def record(self, record: Mapping[str, Any]) -> None:
        """Write a record, in the process that writes them."""
        if self.log is not None:
            self.log.write(record)

    def weighted(self, losses: Mapping[str, Any]) -> Any:
        """The sum of the methods' losses, each times its weight."""
        return sum(weight * losses[name] for name, weight in self.run.objective.weights.items())

    def write_pending(self) -> None:
        """Write the record of the last step that has none yet.

        Raises:
            TrainingError: its loss, or the norm of its gradient where that is known, is NaN or infinite.
        """
        outcome, self._pending = self._pending, None
        if outcome is None:
            return
        losses = {name: value.item() for name, value in outcome.losses.items()}
        loss = self.weighted(losses)
        norm = None if outcome.gradient_norm is None or outcome.scaled_away else float(outcome.gradient_norm)
        if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
            raise _step_not_finite(outcome, losses, norm, self.run.reader.path)
        record = {"step": outcome.step, "loss": loss, **losses, "grad_norm": norm, **outcome.record}
        if outcome.scaled_away:
            record["scaled_away"] = 1
        self.record(record)
        self.progress.step(outcome.step, loss=loss, losses=losses, tokens=outcome.tokens, wait=outcome.record["wait"])

    def validate_if_due(self) -> None:
        """Validate before the first step, after the last, and in between as often as asked; each step once."""
        step, run = self.state.step, self.run
        if self.state.validated_step != step and (step % run.valid_every == 0 or step == run.steps):
            self.validate()

    def validate(self) -> None:
        """Losses on the held-out rows, recorded under `valid_…`; the student is kept if it was never better.

        Raises:
            TrainingError: one of them is NaN or infinite, and so are weights of the student.
            DistillationError: the rows cannot be read; what is trained is saved.
        """
        self.write_pending()
        state = self.state
        try:
            losses, skipped_rows = validation_losses(self.run, self.engine, self.progress.skipped)
        except DistillationError as error:
            raise self.save_before(error) from error
        if not all(map(math.isfinite, losses.values())):
            raise _validation_not_finite(state.step, losses)
        state.validated_step = state.step
        loss = self.weighted(losses)
        state.valid = {"valid_loss": loss, **{f"valid_{name}": value for name, value in losses.items()}}
        better = state.best_valid_loss is None or loss < state.best_valid_loss
        if better:
            state.best_valid_loss, state.best_step = loss, state.step
        skipped = {"valid_skipped_rows": skipped_rows} if skipped_rows else {}
        self.record({"step": state.step, **state.valid, **skipped})
        parts_text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self.progress.say(f"step {state.step}/{self.run.steps}: validation loss {loss:.4g} ({parts_text})")
        # the last student is exported anyway
        if better and 0 < state.step < self.run.steps:
            keep_best(self.run, result=asdict(state))

    def save(self) -> None:
        """Write a checkpoint of this step, once its loss is known to be a number."""
        self.write_pending()
        out = Path(self.run.settings.out)
        state = {"progression": asdict(self.state), "adaptation": self.run.objective.adaptation()}
        identity, ranks = self.run.identity(), self.run.ranks
        save_checkpoint(self.engine, out, step=self.state.step, identity=identity, state=state, ranks=ranks)
        self._saved_step = self.state.step

    def save_before(self, error: DistillationError) -> DistillationError:
        """Save what is trained before `error` ends it; returns the error to end with."""
        if self.state.step == 0 or not self._saves:
            return error
        if self.state.step != self._saved_step:
            try:
                self.save()
            except SpaceError as full:
                return TrainingError(f"{error}; and what was trained since the last checkpoint is lost: {full}")
        path = checkpoint_path(Path(self.run.settings.out), self.state.step)
        return type(error)(
            f"{error}\n{self.state.step} steps are saved in {str(path)!r}: once that is mended, the same command with "
            "--resume auto goes on from there"
        )


def _step_not_finite(
    outcome: StepOutcome, losses: Mapping[str, float], norm: float | None, cache: str
) -> TrainingError:
    what, blocks = "gradient" if all(map(math.isfinite, losses.values())) else "loss", outcome.blocks
    return TrainingError(
        f"the {what} of step {outcome.step} is not a finite number ({_list_losses(losses)}, gradient norm {norm!r}) on "
        f"the rows with ids {list(outcome.row_ids)} of block{'s' if len(blocks) > 1 else ''} "
        f"{', '.join(map(str, blocks))} of {cache}: every weight would become NaN with it, so training stopped; "
        "start anew with a lower --lr or a longer --warmup, and if it happens on the same rows again look at them in "
        "the cache"
    )


def _validation_not_finite(step: int, losses: Mapping[str, float]) -> TrainingError:
    advice = "start anew with a lower --lr or a longer --warmup"
    if step == 0:
        advice = "nothing is trained yet, so look at the weights that --student or --init names, and at the cache"
    return TrainingError(
        f"the validation loss after step {step} is not a finite number ({_list_losses(losses)}): the student's weights "
        f"are of no use any more, so they were neither saved nor exported; {advice}"
    )


def _list_losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in losses.items())
