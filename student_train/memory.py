"""How much memory this process has taken."""

from __future__ import annotations

from pathlib import Path

import torch


def most_memory(device: str) -> int:
    """Bytes: the most that this process has had since its start, of its GPU if it has one, else of the machine."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # what getrusage tells would be its parent's, if that had more
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
