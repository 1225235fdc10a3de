"""What the harness found: as JSON and back, which metric stands for a task, and the table."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from student_train.evaluate.lm_eval.records import LmEvalReport, Metric, TaskResult, lm_eval_table

ACC = Metric(value=0.5, stderr=0.01, higher_is_better=True)
LARGE = Metric(value=12345678.9, stderr=None, higher_is_better=False)


def make_result(metrics: dict[str, Metric], **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "task": "animals", "group": None, "version": "1.0", "shots": 5, "examples": 100, "config_sha256": "c",
    }  # fmt: skip
    return TaskResult(metrics=metrics, **{**values, **changes})


GROUP = make_result({"acc": ACC}, task="all", version=None, shots=None, examples=None, config_sha256=None)
REPORT = LmEvalReport(
    student="s", results=(GROUP, make_result({"acc": ACC, "acc_norm": ACC}, group="all"), make_result({"w": LARGE})),
    limit=7, dtype="float32", device="cpu", harness="0.4.13", fingerprints={"student": "x"}, notes=("note",),
)  # fmt: skip


def test_json_and_back() -> None:
    assert LmEvalReport.from_json(json.loads(json.dumps(REPORT.to_json(), allow_nan=False))) == REPORT
    assert [result.task for result in REPORT.named] == ["all", "animals"]


@pytest.mark.parametrize(
    "names, main",
    [
        (("acc", "acc_norm"), "acc_norm"),
        (("exact_match,strict", "exact_match,flexible"), "exact_match,strict"),
        (("word_perplexity", "bits_per_byte"), "bits_per_byte"),
        (("own",), "own"),
    ],
)
def test_the_metric_that_stands_for_a_task(names: tuple[str, ...], main: str) -> None:
    assert make_result(dict.fromkeys(names, ACC)).main == main


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"metrics": {}}, "results.0.metrics"),
        ({"metrics": {"acc": {"value": "x", "stderr": None}}}, "results.0.metrics.acc.value"),
        ({"metrics": {"acc": {**asdict(ACC), "value": True}}}, "results.0.metrics.acc.value"),
        ({"shots": "5"}, "results.0.shots"),
        ({"examples": -1}, "results.0.examples"),
    ],
)
def test_records_that_cannot_be(changes: dict[str, Any], named: str) -> None:
    record = REPORT.to_json()
    record["results"][0] |= changes
    with pytest.raises(ValueError, match=f"the field '{named}' is"):
        LmEvalReport.from_json(record)


def test_a_task_that_is_named_twice_is_refused() -> None:
    record = REPORT.to_json()
    record["results"].append(record["results"][0])
    with pytest.raises(ValueError, match="the task 'all' is in 'results' twice"):
        LmEvalReport.from_json(record)


def test_table() -> None:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(lm_eval_table("[b]s", REPORT))
    lines = captured.get().splitlines()
    assert "lm-evaluation-harness on [b]s" in lines[0]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["all", "acc ↑", "0.5000", "0.0100", "–", "–"],
        ["animals", "acc ↑", "0.5000", "0.0100", "5", "100"],
        ["", "acc_norm ↑", "0.5000", "0.0100", "", ""],
        ["animals", "w ↓", "1.235e+07", "–", "5", "100"],
    ]
    assert "the first 7 questions" in captured.get()
