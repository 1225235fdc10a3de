"""Does the memory of a process stay flat while the training loader runs in it for minutes? Used by `loader.py`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from student_train.data.loader import CacheLoader
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.read.reader import CacheReader


def watch_memory(reader: CacheReader, request: TargetRequest, batch_size: int, minutes: float) -> dict[str, Any]:
    """Resident memory while the loader runs on and on."""
    loader = CacheLoader(reader, request, rows=(range(reader.rows),), batch_size=batch_size, seed=0)
    started = time.monotonic()
    passed, samples, batches = 0.0, [], 0
    for _ in loader:
        batches += 1
        passed = time.monotonic() - started
        if passed >= len(samples):
            samples.append((passed / 60, resident_mb()))
        if passed >= 60 * minutes:
            break
    loader.close()
    settled = np.asarray([sample for sample in samples if sample[0] >= min(1.0, minutes / 5)])
    return {
        "minutes": round(passed / 60, 2),
        "batches": batches,
        "epochs": round(batches * batch_size / reader.rows, 1),
        "slope_mb_per_minute": round(float(np.polyfit(*settled.T, 1)[0]), 3),
        "max_over_min": round(float(settled[:, 1].max() / settled[:, 1].min()), 4),
        "samples_mb": [round(mb, 1) for _, mb in samples[:: max(1, len(samples) // 60)]],
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
