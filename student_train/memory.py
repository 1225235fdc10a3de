"""How much memory this process has taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from teacher_cache.errors import TrainingError


@contextmanager
def clear_memory_errors() -> Iterator[None]:
    """Around everything that a training puts on its device.

    Raises:
        TrainingError: the GPU's memory is used up.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU has too little memory for this training ({str(error).splitlines()[0]}): nothing more can be "
            "computed; give a smaller --micro-batch-size, --activation-checkpointing, a smaller --student, or more "
            "processes with ZeRO stage 3 (--deepspeed); complete checkpoints are safe, --resume auto goes on"
        ) from error


def most_memory(device: str) -> int:
    """Bytes: the most that this process has had since its start, of its GPU if it has one, else of the machine."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # what getrusage tells would be its parent's, if that had more
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
