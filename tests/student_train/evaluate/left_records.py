"""Records as `kdtrain` and `kdeval` leave them in a directory, written by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from student_train.evaluate.lm_eval.records import LmEvalReport, Metric, TaskResult
from student_train.evaluate.perplexity.records import PerplexityReport, TextScore


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record))


def finetuned(run: Path, task: str, scores: list[float], **changes: Any) -> None:
    record = {
        "evaluation": "finetune", "student": str(run), "task": task, "metric": "accuracy", "scores": scores,
        "seeds": list(range(len(scores))), "settings": {"epochs": 3}, "examples": {"train": 10, "dev": 5},
    }  # fmt: skip
    write(run / f"finetune-{task}.json", {**record, **changes})


def saved(run: Path, score: float, **changes: Any) -> None:
    """A finetuned.json: sst2 with seed 3, scored on a dev set."""
    record = {
        "student": "student", "task": "sst2", "kind": "classification", "metric": "accuracy", "columns": [["sentence"]],
        "label_column": ["label"], "labels": ["0", "1"], "own": False, "seed": 3, "learning_rate": 3e-5,
        "measures": {"dev": {"accuracy": score}}, "examples": {"train": 1000, "dev": 50}, "sources": {},
        "settings": {"epochs": 3}, "fingerprints": {"weights": "w"}, "base": None,
        "command": "kdeval finetune --save it",
    }  # fmt: skip
    write(run / "finetuned.json", {**record, **changes})


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


def read_text(run: Path, bits: float, **changes: Any) -> PerplexityReport:
    """A perplexity.json whose student needs so many bits a byte, its teacher (weights `t`) one."""
    text = {"tokens": 500, "bytes": 1000, "start": "<s>"}
    report = PerplexityReport(
        student=str(run), teacher="teacher", text=("text.txt",), documents=3, seq_len=64, stride=32, dtype="float32",
        device="cpu", student_score=TextScore(nats=bits * 1000 * math.log(2), **text),
        teacher_score=TextScore(nats=1000 * math.log(2), **text), notes=("a note of the text",),
        fingerprints={"teacher": "t", "text": "text", "vocabulary": "v"},
    )  # fmt: skip
    report = replace(report, **changes)
    write(run / "perplexity.json", {"evaluation": "perplexity", **report.to_json()})
    return report


def harnessed(run: Path, scores: dict[str, float], **changes: Any) -> LmEvalReport:
    """An lm-eval.json with accuracies of tasks."""
    results = [
        TaskResult(
            task=task, metrics={"acc": Metric(value=score, stderr=0.01, higher_is_better=True)}, group=None,
            version="1.0", shots=0, examples=100, config_sha256="c",
        )
        for task, score in scores.items()
    ]  # fmt: skip
    report = LmEvalReport(
        student=str(run), results=tuple(results), limit=None, dtype="float32", device="cpu", harness="0.4.13"
    )
    report = replace(report, **changes)
    write(run / "lm-eval.json", {"evaluation": "lm-eval", **report.to_json()})
    return report


def answered(run: Path, rate: float, **changes: Any) -> None:
    """A latency.json of a causal student: tokens a second of four answers, a quarter of that for one."""
    setup = {"backend": "pytorch", "device": "cpu", "dtype": "float32", "threads": 1, "prompt_tokens": 128}
    times = {"new_tokens": 32, "first_token_ms": 8.0, "first_token_p90_ms": 9.0, "runs": 5}
    beside = {"teacher_first_token_ms": 16.0, "teacher_tokens_per_second": 50.0}
    record = {
        "evaluation": "latency", "student": str(run), "teacher": "teacher", "parameters": 7_000_000,
        "teacher_parameters": 22_000_000, "onnx_max_error": None, "hardware": {"cpu": "one"}, "measurements": [],
        "generation": [
            {**setup, **times, **beside, "batch_size": size, "tokens_per_second": rate * size / 4} for size in (4, 1)
        ],
        "fingerprints": {"teacher": "t"},
    }  # fmt: skip
    write(run / "latency.json", {**record, **changes})
