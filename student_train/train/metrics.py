"""What a training run tells: metrics.jsonl for programs, TensorBoard for eyes, progress on standard error.

`metrics.jsonl` holds one JSON object a line. Training records have `step` (counted from 1), `loss`, one entry per part
of it, `lr`, `tokens` (real tokens seen so far), `rows` (rows seen so far), `grad_norm`, `seconds`, `wait` (of which:
waiting for the cache) and `memory` (bytes: the most so far); where rows of damaged blocks were left out also
`skipped_rows` (so far), and where scaled losses overflowed and the step was left out `scaled_away`. Validation records
have `step` and `valid_…` entries, `valid_skipped_rows` (of this validation) among them where rows were left out. Lines
are written whole and flushed at once, so that a killed run loses none that it announced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from student_train.out_folder import explain_write_errors
from student_train.run_files import METRICS_NAME, check_curves, read_records
from student_train.train.weights_and_biases import WeightsAndBiases, curve_name
from teacher_cache.disk import write_whole

TENSORBOARD_NAME = "tensorboard"
_PLAIN_LINE_SECONDS = 10.0


class MetricsLog:
    """Appends records to metrics.jsonl and TensorBoard, after dropping those beyond the step that is gone on from."""

    def __init__(self, out: Path, *, last_step: int | None) -> None:
        """Open both in `out`, to go on after `last_step`, or (None) from the beginning."""
        from torch.utils.tensorboard import SummaryWriter

        path = out / METRICS_NAME
        self._out = out
        self._further: WeightsAndBiases | None = None
        with explain_write_errors(out):
            truncate_records(path, -1 if last_step is None else last_step)
            self._file = path.open("a", encoding="utf-8")
            purge_step = 0 if last_step is None else last_step + 1
            self._board: Any = SummaryWriter(out / TENSORBOARD_NAME, purge_step=purge_step)

    def also_to(self, further: WeightsAndBiases) -> None:
        """Records go there too from now on, and it is closed with this log."""
        self._further = further

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record of finite numbers; each of them but the step becomes a TensorBoard curve."""
        with explain_write_errors(self._out):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(curve_name(name), value, record["step"])
        if self._further is not None:
            self._further.write(record)

    def close(self) -> None:
        """Flush and close all."""
        if self._further is not None:
            self._further.close()
        with explain_write_errors(self._out):
            try:
                self._file.close()
            finally:
                self._board.close()


def truncate_records(path: Path, last_step: int) -> None:
    """Keep the records up to `last_step`, so that a resumed run records no step twice; replaces the file whole.

    Raises:
        TrainingError: the file is damaged, or a record lacks something.
    """
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= last_step]
    check_curves(path, kept)
    write_whole(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


class Progress:
    """Tells on standard error what happens: lines of text, and a bar on a terminal or else a line every ten seconds."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet)
        self._damage: set[str] = set()
        self._bar: Any = None

    def say(self, text: str) -> None:
        """One line, above the bar if there is one. Taken literally, never wrapped."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def skipped(self, damage: Iterable[str]) -> None:
        """Rows of these damaged blocks are left out: each is said once."""
        for message in damage:
            if message not in self._damage:
                self._damage.add(message)
                self.say(f"skipped  {message}")

    def start(self, *, total: int, step: int) -> None:
        """Steps from `step` to `total` follow."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._total, self._first = total, step
        self._started = self._last_line = time.monotonic()
        self._tokens, self._waited = 0, 0.0
        if self._console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=step)
            self._bar.start()

    def step(self, step: int, *, loss: float, losses: Mapping[str, float], tokens: int, wait: float) -> None:
        """Step `step` is done: it cost `loss`, the sum of `losses`, read `tokens` tokens and waited so many seconds."""
        now = time.monotonic()
        self._tokens += tokens
        self._waited += wait
        seconds = max(now - self._started, 1e-9)
        parts = f" ({', '.join(f'{name} {value:.4g}' for name, value in losses.items())})" if len(losses) > 1 else ""
        text = f"loss {loss:.4g}{parts}, {self._tokens / seconds:,.0f} tok/s, {self._waited / seconds:.1%} waiting"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= _PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = now
            left = (self._total - step) * seconds / (step - self._first)
            self.say(f"step {step}/{self._total}: {text}, {left:,.0f} s left")

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
