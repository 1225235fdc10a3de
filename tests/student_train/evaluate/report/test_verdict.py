"""The verdict in words: every sentence from records written by hand, and what nobody has measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from student_train.evaluate.report.verdict import speedups, verdict
from student_train.evaluate.run_records import RunRecords, read_run
from tests.student_train.evaluate.left_records import answered, finetuned, harnessed, read_text, timed, write
from tests.student_train.evaluate.reports import make_report


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": number, "loss": loss, "lr": 0.1, "tokens": 1000 * number, "seconds": 1.0, "wait": 0.0}


def validation(number: int, loss: float, **parts: float) -> dict[str, Any]:
    return {"step": number, "valid_loss": loss, **{f"valid_{name}": value for name, value in parts.items()}}


@pytest.fixture
def records(make_run: Any) -> RunRecords:
    return read_run(str(make_run("run")))


@pytest.mark.parametrize(
    "metrics, said",
    [
        (
            [validation(0, 6.0, od=2.0, hs=4.0), *map(step, range(1, 4)), validation(3, 2.0, od=0.5, hs=1.5)],
            "fell from 6, that of the untrained student, to 2, 3 times smaller (od from 2 to 0.5, hs from 4 to 1.5)",
        ),
        (
            [validation(0, 6.0), step(1), validation(1, 3.0), step(2), validation(2, 4.0)],
            "2 times smaller, reached at step 1 and not after it. It took 2 steps",
        ),
        (
            [validation(0, 2.0), step(1), validation(1, 2.0)],
            "nothing to speak of: after 1 step on 1,000 tokens (1 s)",
        ),
        ([validation(0, 2.0), step(1), validation(1, 3.0)], "on held-out rows is 2 at best, and that of the untrained"),
        ([validation(0, 2.0)], "This is the untrained student: its loss on rows held out from training is 2."),
        ([step(5), validation(5, 2.0)], "its loss on held-out rows is 2 at best."),
    ],
)
def test_training(metrics: list[dict[str, Any]], said: str, records: RunRecords) -> None:
    assert said in dict(verdict(records, metrics))["Training"]


def test_nothing_is_said_that_no_record_says(records: RunRecords) -> None:
    found = dict(verdict(records, []))
    assert found == {
        "Not known": "Nobody has measured how far it is from the untrained student, how close it comes to its "
        "teacher, how it does on a task and how fast it is."
    }


def test_an_encoder_with_everything(make_run: Any) -> None:
    run = make_run("run", scores=[0.5, 0.7])
    timed(run, 3.0)
    fidelity = make_report()
    write(run / "fidelity.json", {"evaluation": "fidelity", **fidelity.to_json()})
    finetuned(run, "rte", [0.25])
    found = read_run(str(run))
    said = dict(verdict(found, [validation(0, 2.0), step(1), validation(1, 1.0)]))
    assert "on rows that it was not trained on" in said["What it keeps"].lower()
    assert "most probable token at 50% of 380 places" in said["What it keeps"]
    assert "25.0 on rte (accuracy × 100) and 60.0 on sst2 (accuracy × 100)" in said["Quality"]
    assert said["What it costs"].startswith("It has 32% of its teacher's parameters, 7.00M of 22.00M. It runs ")
    assert sorted(speedups(found)) == pytest.approx([1.0, 8.0]) and "1.0 to 8.0 times" in said["What it costs"]
    assert "Not known" not in said
    write(run / "fidelity.json", {"evaluation": "fidelity", **replace(fidelity, held_out=False).to_json()})
    said = dict(verdict(read_run(str(run)), []))
    assert "rows that may be among those it was trained on" in said["What it keeps"]


def test_relations_of_several_pairs_are_a_mean(make_run: Any) -> None:
    run, report = make_run("run"), make_report()
    report = replace(report, relations=3 * report.relations)
    write(run / "fidelity.json", {"evaluation": "fidelity", **report.to_json()})
    said = dict(verdict(read_run(str(run)), []))["What it keeps"]
    assert "relations are 2 nats from the teacher's (queries, keys and values together, mean over 3 pairs" in said


def test_a_causal_student(make_run: Any) -> None:
    run = make_run("run")
    assert "how well it predicts text" in dict(verdict(replace(read_run(str(run)), causal=True), []))["Not known"]
    report = read_text(run, 2.0)
    harnessed(run, {"animals": 0.75})
    answered(run, 100.0)
    said = dict(verdict(read_run(str(run)), []))
    assert "It takes 2.000 bits to predict a byte of text, the teacher 1.000: 100.0% more." in said["Quality"]
    assert "0.75 on animals (acc)" in said["Quality"]
    read_text(run, 2.0, teacher=None, teacher_score=None, fingerprints=report.fingerprints)
    assert "what the teacher takes was not measured" in dict(verdict(read_run(str(run)), []))["Quality"]
