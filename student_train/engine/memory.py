"""How much memory this process has taken, and a message where the GPU has too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from teacher_cache.errors import DeviceMemoryError, first_line

OF_TRAINING = (
    "a smaller --micro-batch-size, --activation-checkpointing, a smaller --student, or more processes with ZeRO stage "
    "3 (--deepspeed); complete checkpoints are safe, --resume auto goes on"
)


@contextmanager
def explain_memory_errors(advice: str) -> Iterator[None]:
    """Around everything that is put on a device; `advice` is what to give.

    Raises:
        DeviceMemoryError: the GPU's memory is used up.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the GPU has too little memory for this ({first_line(error)}): nothing more can be computed; give {advice}"
        ) from error


def most_memory(device: str) -> int:
    """Bytes: the most that this process has had since its start, of its GPU if it has one, else of the machine."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # what getrusage tells would be its parent's, if that had more
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
