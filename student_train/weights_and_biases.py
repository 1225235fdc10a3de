"""The metrics of a run on Weights & Biases, beside the files that are always written.

Optional: needs the `wandb` package. Where it is sent, and whether at all, is decided by that package's own environment
(`WANDB_MODE=offline` keeps it on disk). A run that is resumed goes on as the same one there.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """One run of a project; its number follows from where it is written."""

    def __init__(self, project: str, out: Path, config: Mapping[str, Any]) -> None:
        """Open it.

        Raises:
            TrainingError: it is refused: no login, no network, no such project.
        """
        import wandb

        number = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
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
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def curve_name(name: str) -> str:
    """Of a record's entry, the curve that it is drawn in: `valid_mha` in `valid/mha`, `lr` in `train/lr`."""
    return f"valid/{name.removeprefix('valid_')}" if name.startswith("valid_") else f"train/{name}"
