"""Checkpoints of ZeRO stages 1 and 2 for another number of processes, through DeepSpeed's universal form.

At these stages each process writes its part of the optimizer, and only as many processes can read the parts back.
DeepSpeed's converter puts them together, parameter by parameter; the engine cuts them anew. The result lies beside the
checkpoint while it is read, is not a checkpoint of its own, and is deleted afterwards. Cost: one more process, which
imports DeepSpeed, and the optimizer's bytes on disk once more.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from student_train.engine.engine import DeepSpeedConfig
from student_train.engine.ranks import Ranks
from student_train.out_folder import explain_write_errors
from teacher_cache.errors import TrainingError

READ_UNIVERSAL = {"checkpoint": {"load_universal": True}}
"""What the engine's configuration needs to read one."""


def needs_universal(config: DeepSpeedConfig, written_by: int, ranks: Ranks) -> bool:
    """Whether a checkpoint that so many processes wrote has parts that these cannot read as they are."""
    return written_by != ranks.count and config["zero_optimization"].get("stage", 0) > 0


@contextmanager
def universal_form(checkpoint: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder of a checkpoint in universal form, made by the first process and there for all inside the context.

    Raises:
        TrainingError: DeepSpeed cannot convert it.
    """
    folder = checkpoint.with_name(f".{checkpoint.name}-universal")
    try:
        with ranks.together(), explain_write_errors(folder):
            if ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
                _convert(checkpoint, folder)
        yield folder
    finally:
        # nobody is left reading: loading ends together
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def own_groups(engine: Any) -> Iterator[None]:
    """Around reading the universal form at ZeRO stage 3, where DeepSpeed 0.19 mixes up the groups of parameters.

    It gives all of them the weight decay of the first, and one shared count of steps, which then goes up once a group
    and spoils Adam's bias correction.
    """
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    yield
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _convert(checkpoint: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    paths = ["--input_folder", str(checkpoint), "--output_folder", str(folder)]
    done = subprocess.run([*command, *workers, *paths], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise TrainingError(
            f"checkpoint {str(checkpoint)!r} was written by another number of processes, and DeepSpeed cannot convert "
            f"it ({done.stderr.strip()[-500:]}): its optimizer would be lost; resume with as many processes as wrote it"
        )
