"""Metrics of small cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from student_train.evaluate.finetune.metrics import measure
from student_train.evaluate.finetune.tasks import TASKS


def test_classes() -> None:
    # of label 1: 2 found, 1 missed, 1 too many
    found = measure(TASKS["mrpc"], [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0])
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 4 / 6, "matthews": 1 / 3})
    assert measure(TASKS["cola"], [1, 1, 1], [1, 0, 1])["matthews"] == 0
    assert measure(TASKS["mnli"], [0, 1, 2, 2], [0, 1, 2, 1]) == {"accuracy": 0.75}


def test_scores() -> None:
    found = measure(TASKS["stsb"], [0.1, 0.2, 0.9], [0.0, 1.0, 2.0])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(0.8 / (2 * (0.09 + 0.04 + 0.25)) ** 0.5, rel=0.02)
    assert measure(TASKS["stsb"], [2.0, 2.0, 2.0], [0.0, 1.0, 2.0]) == {"spearman": 0, "pearson": 0}


def test_entities() -> None:
    """Whole entities count, and IOB1 names the same ones as IOB2."""
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
    predictions = [["I-PER", "I-PER", "O", "O"], ["B-ORG", "I-ORG"]]
    assert measure(TASKS["ner"], predictions, labels) == pytest.approx({"f1": 0.4, "precision": 0.5, "recall": 1 / 3})
    assert measure(TASKS["ner"], [["O"] * 4, ["O"] * 2], labels)["f1"] == 0


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_metric(name: str) -> None:
    task = TASKS[name]
    labels = {"tokens": [["B-PER"], ["O"]], "regression": [0.0, 5.0], "classification": [0, 1]}[task.kind]
    assert measure(task, labels, labels)[task.metric] == pytest.approx(1)
