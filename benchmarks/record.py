"""Shared by the benchmarks: keep to one core, and print the JSON line with machine, versions, command and figures."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from student_train.run_files import run_provenance

_LOAD_BEFORE = round(os.getloadavg()[0], 2)
"""Load average at the start: timings of a machine that was busy with something else mean little."""


def keep_to_one_core() -> None:
    """Libraries that have threads of their own share the core too."""
    import torch

    torch.set_num_threads(1)
    core = {min(os.sched_getaffinity(0))}
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), core)


def print_record(benchmark: str, **figures: Any) -> None:
    """Print the line on standard output."""
    print(json.dumps({"benchmark": benchmark, **run_provenance(), "machine": describe_machine(), **figures}))


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators. No names or addresses."""
    import torch

    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load_before": _LOAD_BEFORE,
    }


def _field(file: str, name: str) -> str | None:
    path = Path(file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
