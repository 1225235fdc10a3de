"""The metrics of a run on Weights & Biases, beside the files that are always written.

Optional: needs the `wandb` package. Where it is sent, and whether at all, is decided by that package's own environment
(`WANDB_MODE=offline` keeps it on disk). A run that is resumed goes on as the same one there.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from student_train.out_folder import explain_write_errors
from teacher_cache.errors import SettingsError, TrainingError


def check_installed(project: str) -> None:
    """Refuse to start where the package is missing.

    Raises:
        SettingsError: it is.
    """
    if importlib.util.find_spec("wandb") is None:
        raise SettingsError(
            f"--wandb {project!r}: the package wandb is not installed, so no metrics could be sent; run `pip install "
            "'kdcache[wandb]'`, or leave the flag out: metrics.jsonl and tensorboard/ are written either way"
        )


class WeightsAndBiases:
    """One run of a project; its number is kept beside what it writes."""

    def __init__(self, project: str, out: Path, config: Mapping[str, Any], *, resumed: bool) -> None:
        """Open it, as the same run as before if this one is resumed.

        Raises:
            TrainingError: it is refused: no login, no network, no such project.
        """
        import wandb

        number = _run_number(out / "wandb" / "run-number", resumed)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=out.name,
                id=number,
                resume="allow",
                dir=out,
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:
            raise TrainingError(
                f"--wandb {project!r} cannot be written to ({error}): its curves would be missing; log in with `wandb "
                "login`, set WANDB_MODE=offline to send them later, or leave the flag out"
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """One record; numbers of validations under `valid/`, all others under `train/`."""
        values = {curve_name(name): value for name, value in record.items() if name != "step"}
        self._try(lambda run: run.log(values, step=record["step"]))

    def close(self) -> None:
        """Send what is left."""
        self._try(lambda run: run.finish())

    def _try(self, send: Callable[[Any], None]) -> None:
        """A training does not end because its curves cannot be sent: metrics.jsonl has them."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # noqa: BLE001 - whatever its service raises
            self._run = None
            logging.getLogger(__name__).warning("Weights & Biases gets no more metrics (%s); metrics.jsonl does", error)


def _run_number(file: Path, resumed: bool) -> str:
    """Of the run before, or a new one."""
    with explain_write_errors(file.parent):
        if resumed and file.exists():
            return file.read_text(encoding="utf-8")
        number = secrets.token_hex(8)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(number, encoding="utf-8")
    return number


def curve_name(name: str) -> str:
    """Of a record's entry, the curve that it is drawn in: `valid_mha` in `valid/mha`, `lr` in `train/lr`."""
    return f"valid/{name.removeprefix('valid_')}" if name.startswith("valid_") else f"train/{name}"
