"""The training loop: batches from the loader, steps of the engine, records, validations and checkpoints.

Losses are sums over the real positions of the batch, or its rows, divided by their number in the global batch, so that
the result does not depend on how a batch is cut into passes. Reading a loss off the device waits for it, so the record
of a step is written, and checked for NaN, while the next step runs. SIGTERM and Ctrl-C finish the step, save a
checkpoint and end the loop; a second one ends the process at once.

Several processes go step by step together. Before each they tell each other, from host to host, how many positions
their shares hold, whether one of them was asked to stop, and whether one cannot read its share: then all stop there.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from student_train.checkpoint import save_checkpoint
from student_train.engine import gradient_norm
from student_train.loader import CacheLoader, TrainingBatch
from student_train.losses.sums import LossSum
from student_train.metrics import MetricsLog, Progress
from student_train.run import TrainingRun
from teacher_cache.errors import DistillationError, TrainingError


@dataclass(kw_only=True)
class Progression:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    best_valid_loss: float | None = None
    best_step: int = 0
    valid: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step left on the device and on the host, not yet waited for."""

    step: int
    losses: dict[str, Tensor]
    gradient_norm: Any
    learning_rate: float
    tokens_seen: int
    tokens: int
    seconds: float
    wait: float
    row_ids: list[int]


class Trainer:
    """One run from where it stands to its last step."""

    def __init__(
        self, run: TrainingRun, engine: Any, state: Progression, log: MetricsLog | None, progress: Progress
    ) -> None:
        self.run, self.engine, self.state, self.log, self.progress = run, engine, state, log, progress
        self._pending: StepOutcome | None = None
        self._saved_step = state.step

    def fit(self) -> signal.Signals | None:
        """Train to the last step, or until a signal asks to stop, which it returns; it is saved either way."""
        run, state = self.run, self.state
        self.progress.start(total=run.steps, step=state.step)
        with _stop_signals() as received, closing(run.training_batches(state.position)) as batches:
            if state.step == 0:
                self.validate()
            while state.step < run.steps and self.update(batches, received):
                if state.step % run.valid_every == 0 or state.step == run.steps:
                    self.validate()
                if state.step % run.settings.save_every == 0:
                    self.save()
            if state.step != self._saved_step:
                self.save()
        return received[0] if received else None

    def update(self, batches: CacheLoader, received: list[signal.Signals]) -> bool:
        """One optimizer step on the next batch, and the record of the step before; False if a signal came instead."""
        started, waited = time.perf_counter(), batches.wait_seconds
        found = self.next_batch(batches, received)
        if found is None:
            return False
        batch, counts = found
        learning_rate = self.engine.get_lr()[0]
        losses, norm = self.backward(batch, counts)
        state = self.state
        state.step += 1
        state.position = batch.position + self.run.settings.batch_size
        state.tokens += counts["positions"]
        self.write_pending()
        self._pending = StepOutcome(
            step=state.step,
            losses=losses,
            gradient_norm=norm,
            learning_rate=learning_rate,
            tokens_seen=state.tokens,
            tokens=counts["positions"],
            seconds=time.perf_counter() - started,
            wait=batches.wait_seconds - waited,
            row_ids=list(batch.row_ids),
        )
        return True

    def next_batch(
        self, batches: CacheLoader, received: list[signal.Signals]
    ) -> tuple[TrainingBatch, dict[str, int]] | None:
        """This process's share of the next batch, and what the losses of the whole batch are sums over.

        None if any process was asked to stop, and `received` says so then in all of them.

        Raises:
            DistillationError: a process cannot read its share.
        """
        batch, failure, ranks = None, None, self.run.ranks
        if not received:
            try:
                batch = next(batches)
            except DistillationError as error:
                failure = error
        own = (None if failure is None else str(failure), batch and batch.counts, received[0] if received else None)
        messages, counts, signals = zip(*ranks.gather(own), strict=True)
        ranks.end_if_failed(failure, messages)
        received.extend([number for number in signals if number is not None and not received][:1])
        if received or batch is None:
            return None
        return batch, {name: sum(part[name] for part in counts) for name in batch.counts}

    def backward(self, batch: TrainingBatch, counts: Mapping[str, int]) -> tuple[dict[str, Tensor], Any]:
        """Gradients of the batch, pass by pass, and the optimizer step. Returns the losses and the gradient's norm.

        `counts` are those of the global batch.
        """
        engine, rows, methods = self.engine, self.run.micro_batch, self.run.objective.methods
        parts: dict[str, Tensor] = {}
        norm = None
        for start in range(0, len(batch.row_ids), rows):
            sums = engine({view: targets.rows(start, start + rows) for view, targets in batch.views.items()})
            losses = {name: part.total / max(1, counts[methods[name].counted]) for name, part in sums.items()}
            # each pass has its share of one sum already: DeepSpeed must not divide by the number of passes, and what it
            # averages over ranks is multiplied again
            loss = self.weighted(losses) * self.run.ranks.count
            engine.backward(loss, scale_wrt_gas=False)
            if engine.is_gradient_accumulation_boundary():
                norm = gradient_norm(engine)
            engine.step()
            for name, value in losses.items():
                parts[name] = parts.get(name, 0) + value.detach()
        self.run.objective.finish_step()
        totals = self.run.ranks.add_up(torch.stack(list(parts.values())))
        parts = dict(zip(parts, totals.unbind(), strict=True))
        return parts, engine.get_global_grad_norm() if norm is None else norm

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
        norm = None if outcome.gradient_norm is None else float(outcome.gradient_norm)
        if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
            raise _step_not_finite(outcome, losses, norm)
        self.record(
            {
                "step": outcome.step,
                "loss": loss,
                **losses,
                "lr": outcome.learning_rate,
                "tokens": outcome.tokens_seen,
                "grad_norm": norm,
                "seconds": outcome.seconds,
                "wait": outcome.wait,
            }
        )
        self.progress.step(outcome.step, loss=loss, tokens=outcome.tokens)

    def validate(self) -> None:
        """Losses on the held-out rows, recorded under `valid_…`.

        Raises:
            TrainingError: one of them is NaN or infinite, and so are weights of the student.
        """
        self.write_pending()
        sums: dict[str, list[LossSum]] = {}
        self.engine.eval()
        ranks = self.run.ranks
        with ranks.together(), torch.no_grad(), closing(self.run.validation_batches()) as batches:
            for batch in batches:
                for name, part in self.engine(batch.views).items():
                    sums.setdefault(name, []).append(part)
        self.engine.train()
        losses = {name: self.mean(sums.get(name, [])) for name in self.run.objective.methods}
        loss, state = self.weighted(losses), self.state
        if not math.isfinite(loss):
            raise _validation_not_finite(state.step, losses)
        state.valid = {"valid_loss": loss, **{f"valid_{name}": value for name, value in losses.items()}}
        if state.best_valid_loss is None or loss < state.best_valid_loss:
            state.best_valid_loss, state.best_step = loss, state.step
        self.record({"step": state.step, **state.valid})
        parts_text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self.progress.say(f"step {state.step}/{self.run.steps}: validation loss {loss:.4g} ({parts_text})")

    def mean(self, parts: list[LossSum]) -> float:
        """The mean over all positions, or rows, of all parts: a short last batch weighs as much as it holds."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        for part in parts:
            sums += torch.stack([part.total.double(), part.count.double()])
        total, count = self.run.ranks.add_up(sums).tolist()
        return float(total / max(count, 1))

    def save(self) -> None:
        """Write a checkpoint of this step, once its loss is known to be a number."""
        self.write_pending()
        out = Path(self.run.settings.out)
        state = {"progression": asdict(self.state), "adaptation": self.run.objective.adaptation()}
        identity, ranks = self.run.identity(), self.run.ranks
        save_checkpoint(self.engine, out, step=self.state.step, identity=identity, state=state, ranks=ranks)
        self._saved_step = self.state.step


def _step_not_finite(outcome: StepOutcome, losses: Mapping[str, float], norm: float | None) -> TrainingError:
    what = "gradient" if all(map(math.isfinite, losses.values())) else "loss"
    return TrainingError(
        f"the {what} of step {outcome.step} is not a finite number ({_in_words(losses)}, gradient norm {norm!r}) on "
        f"the rows with ids {outcome.row_ids}: every weight would become NaN with it, so training stopped; start anew "
        "with a lower --lr or a longer --warmup, and if it happens on the same rows again look at them in the cache"
    )


def _validation_not_finite(step: int, losses: Mapping[str, float]) -> TrainingError:
    advice = "start anew with a lower --lr or a longer --warmup"
    if step == 0:
        advice = "nothing is trained yet, so look at the weights that --student or --init names, and at the cache"
    return TrainingError(
        f"the validation loss after step {step} is not a finite number ({_in_words(losses)}): the student's weights "
        f"are of no use any more, so they were neither saved nor exported; {advice}"
    )


def _in_words(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in losses.items())


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """While inside, SIGTERM and SIGINT are noted in the list; the second one is handled as it was before."""
    received: list[signal.Signals] = []
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in handled}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in handled:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
