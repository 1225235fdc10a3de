"""Records as `kdtrain` and `kdeval` leave them in a directory, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record))


def finetuned(run: Path, task: str, scores: list[float], **changes: Any) -> None:
    record = {
        "evaluation": "finetune", "student": str(run), "task": task, "metric": "accuracy", "scores": scores,
        "seeds": list(range(len(scores))), "settings": {"epochs": 3}, "examples": {"train": 10, "dev": 5},
    }  # fmt: skip
    write(run / f"finetune-{task}.json", {**record, **changes})


def timed(run: Path, milliseconds: float, **changes: Any) -> None:
    setup = {"backend": "pytorch", "device": "cpu", "dtype": "float32", "threads": 1, "seq_len": 128}
    times = {
        "median_ms": milliseconds,
        "p90_ms": 9.0,
        "p99_ms": 9.0,
        "runs": 5,
        "teacher_median_ms": 24.0,
        "speedup": 0,
    }
    record = {
        "evaluation": "latency", "student": str(run), "teacher": "teacher", "parameters": 7_000_000,
        "teacher_parameters": 22_000_000, "onnx_max_error": None, "hardware": {"cpu": "one"},
        "measurements": [{**setup, **times, "batch_size": size, "median_ms": milliseconds * size} for size in (8, 1)],
    }  # fmt: skip
    write(run / "latency.json", {**record, **changes})
