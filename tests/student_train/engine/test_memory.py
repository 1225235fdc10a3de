"""Memory: how much this process has had, and a message where a GPU has too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_train.engine.memory import OF_TRAINING, explain_memory_errors
from teacher_cache.device import most_memory
from teacher_cache.errors import DeviceMemoryError


def memory_now() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_memory_that_was_freed_counts() -> None:
    before = most_memory("cpu")
    assert before >= memory_now()
    # a system that is short of memory takes other pages away meanwhile: then more has to be asked for
    for more in (32, 128, 512):
        filled = bytearray(b"x") * (before - memory_now() + more * 2**20)
        del filled
        if most_memory("cpu") >= before + 16 * 2**20:
            break
    assert most_memory("cpu") >= before + 16 * 2**20 > memory_now()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_a_gpu_is_its_own() -> None:
    before = most_memory("cuda")
    values = torch.zeros(2**20, device="cuda")
    assert most_memory("cuda") >= max(before, values.nbytes)


def test_a_full_gpu_is_a_message_with_advice() -> None:
    said = "CUDA out of memory. Tried to allocate 20.00 GiB\nand much more about fragments"
    message = r"too little memory for this \(.*20\.00 GiB\).*give more GPUs$"
    with pytest.raises(DeviceMemoryError, match=message) as found, explain_memory_errors("more GPUs"):
        raise torch.OutOfMemoryError(said)
    assert "fragments" not in str(found.value)
    assert "--micro-batch-size" in OF_TRAINING and "--resume auto" in OF_TRAINING


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^size mismatch$"), explain_memory_errors("anything"):
        raise RuntimeError("size mismatch")
