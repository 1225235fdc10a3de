"""A message where the GPU has too little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
