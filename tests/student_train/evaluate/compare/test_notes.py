"""What a reader of a comparison is told: what is missing, with its command, and what makes rows hard to compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from student_train.evaluate.compare.notes import comparison_notes
from student_train.evaluate.compare.rows import make_rows
from student_train.evaluate.run_records import TimingSetup, read_run
from tests.student_train.evaluate.left_records import finetuned, harnessed, read_text, saved, timed, write
from tests.student_train.evaluate.reports import make_report

SETUP = TimingSetup(backend="pytorch", device="cpu", dtype="float32", threads=1, batch_size=1, seq_len=128)


def notes_on(*runs: Path, tasks: tuple[str, ...] = ("sst2",), timed: tuple[str, ...] = ()) -> list[str]:
    rows = make_rows([read_run(str(run)) for run in runs])
    return list(comparison_notes(rows, dict.fromkeys(tasks, "accuracy"), SETUP, timed=timed))


def measured(run: Path, **changes: Any) -> None:
    record = replace(make_report(), **changes).to_json()
    write(run / "fidelity.json", {"evaluation": "fidelity", **record})


def test_nothing_is_said_where_all_is_there_and_alike(make_run: Any) -> None:
    runs = [make_run(name, method=name, scores=[0.5]) for name in ("mha", "hs")]
    for run in runs:
        timed(run, 3.0)
        measured(run)
    assert notes_on(*runs, timed=("mha", "hs")) == []


def test_what_is_missing_is_named_with_its_command(make_run: Any) -> None:
    one, other = make_run("one", scores=[0.5]), make_run("other", method="hs")
    fidelity, task, latency = notes_on(one, other, timed=("one",))
    assert fidelity.startswith("no fidelity of ") and str(one) in fidelity and str(other) in fidelity
    assert fidelity.endswith(": run `kdeval fidelity --student RUN --cache CACHE`")
    assert task == f"no sst2 of {other}: run `kdeval finetune --student RUN --task sst2`"
    assert latency == f"no latency ({SETUP}) of {other}: run `kdeval latency --student RUN --teacher TEACHER`"
    assert "no scores of any run: run `kdeval finetune --student RUN --task TASK`" in notes_on(one, tasks=())


def test_records_of_other_weights_and_models_from_elsewhere(tiny_teacher_copy: Any) -> None:
    student = tiny_teacher_copy("bert")
    finetuned(student, "sst2", [0.9], fingerprints={"weights": "of others"})
    notes = notes_on(student, tasks=())
    assert (
        notes[0]
        == f"finetune-sst2.json of {student} is of other weights than those that lie there now and was left out"
    )
    assert notes[1].startswith(f"no provenance.json in {student}: not trained by kdtrain")
    # its fidelity is not asked for: nobody says that it has a cache
    assert not any(note.startswith("no fidelity") for note in notes)


def test_differences_between_trainings(make_run: Any) -> None:
    notes = notes_on(make_run("a", lr=0.5), make_run("b", method="hs"), make_run("c", method="od", contents="d"))
    (lr,) = [note for note in notes if note.startswith("trainings differ in --lr: ")]
    assert "a 0.5" in lr
    (caches,) = [note for note in notes if note.startswith("trainings read different caches: ")]
    assert caches.endswith(" d") and " c; " in caches


def test_a_student_that_was_trimmed(make_run: Any) -> None:
    whole, trimmed = make_run("whole"), make_run("trimmed", seed=1)
    record = json.loads((trimmed / "provenance.json").read_text())
    vocabulary = {"choice": "kdeval trim --coverage 0.99", "kept": 100, "of": 200, "sha256": "x" * 64}
    write(trimmed / "provenance.json", {**record, "vocabulary": vocabulary})
    assert (
        f"students have different ids of their teacher's: {whole}: all; {trimmed}: 100 of 200 (kdeval trim --coverage "
        f"0.99), {'x' * 12}" in notes_on(whole, trimmed)
    )


def test_what_records_say_of_their_own_figures(make_run: Any) -> None:
    """Once for all that say the same."""
    one, other = make_run("one"), make_run("other", method="hs")
    for run in (one, other):
        measured(run, notes=("no hidden NMSE",))
    read_text(one, 2.0, notes=("31% of the tokens are unknown: bits a byte are too low",))
    harnessed(other, {}, notes=("on the first 2 questions",))
    finetuned(other, "sst2", [0.5], notes=["nothing was learned"])
    notes = notes_on(one, other)
    for said in (
        f"fidelity of {one}, {other}: no hidden NMSE",
        f"perplexity of {one}: 31% of the tokens are unknown: bits a byte are too low",
        f"lm-evaluation-harness of {other}: on the first 2 questions",
        f"sst2 of {other}: nothing was learned",
    ):
        assert said in notes


def test_a_fine_tuned_model_has_its_own_score(make_run: Any, tmp_path: Path) -> None:
    student, model = make_run("student", scores=[0.5]), tmp_path / "model"
    model.mkdir()
    saved(model, 0.9, base=json.loads((student / "provenance.json").read_text()), notes=["a note"])
    notes = notes_on(student, model)
    assert f"{model} was itself fine-tuned on sst2, seed 3" in "\n".join(notes)
    assert f"fine-tuning of {model}: a note" in notes
    assert not any(note.startswith(("no sst2", "no provenance", "no scores")) for note in notes)
    rows = make_rows([read_run(str(run)) for run in (student, model)])
    assert [(row.method, row.init) for row in rows] == [("mha", "auto"), ("mha", "auto")]


def test_the_same_weights_twice(tiny_teacher_copy: Any, tmp_path: Path) -> None:
    one = tiny_teacher_copy("bert")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    assert f"{other} has the same weights as {one}: it is the same model twice" in notes_on(one, other)


def test_measurements_that_are_not_alike(make_run: Any) -> None:
    one, other = make_run("one", scores=[0.5]), make_run("other", method="hs")
    measured(one)
    measured(other, first_row=900, hidden=make_report().hidden[:1], relations=())
    timed(one, 3.0, fingerprints={"teacher": "large"})
    timed(other, 3.0, fingerprints={"teacher": "small"}, hardware={"cpu": "another"})
    finetuned(other, "sst2", [0.5], settings={"epochs": 5}, examples={"train": 10, "dev": 6})
    notes = "\n".join(notes_on(one, other, timed=("one", "other")))
    for said in (
        f"fidelity was measured on different rows: {one}: 980 to 999 of cache.zarr; {other}: 900 to 999 of cache.zarr",
        f"hidden NMSE is a mean over different teacher layers: {one}: 2, 6; {other}: 2",
        f"latency was measured on different hardware: {one}: one; {other}: another",
        f"speed-ups are over different teachers: {one}: weights large; {other}: weights small",
        f"sst2 was fine-tuned with different epochs: {one}: 3; {other}: 5",
        f"sst2 was fine-tuned with different dev examples: {one}: 5; {other}: 6",
    ):
        assert said in notes
    # who has no relations says nothing about their layers
    assert "relation KL" not in notes


def test_divergences_to_different_things(make_run: Any) -> None:
    """What records of earlier versions do not say is compared with nothing."""
    runs = [make_run(name, method=name) for name in ("mha", "hs", "od", "mlm")]
    kinds: list[dict[str, Any]] = [
        {"kind": "exact"}, {"kind": "sample", "entries": 24}, {"kind": "topk", "entries": 8, "kept_ids": 100}, {},
    ]  # fmt: skip
    distribution = make_report().distribution
    assert distribution is not None
    for run, kind in zip(runs, kinds, strict=True):
        measured(run, distribution=replace(distribution, **kind))
    for name in ("kind", "entries", "kept_ids"):
        record = json.loads((runs[3] / "fidelity.json").read_text())
        del record["distribution"][name]
        write(runs[3] / "fidelity.json", record)
    assert (
        f"output KL is to different parts of the teacher's distribution: {runs[0]}: all ids, temperature 1; {runs[1]}: "
        f"24 drawn ids, temperature 1; {runs[2]}: the 8 most probable ids and the rest, over the 100 ids of the "
        "student, temperature 1" in notes_on(*runs)
    )


def test_fingerprints_of_the_data_count_and_those_of_the_student_do_not(make_run: Any) -> None:
    one, other = make_run("one"), make_run("other", method="hs")
    finetuned(one, "sst2", [0.5], fingerprints={"weights": "a", "config": "a", "dev": "a" * 64})
    finetuned(other, "sst2", [0.5], fingerprints={"weights": "b", "config": "b", "dev": "b" * 64})
    text = "\n".join(notes_on(one, other))
    assert "sst2 was fine-tuned with different dev data" in text
    assert "weights data" not in text and "config data" not in text and json.dumps("a" * 41) not in text


def test_long_values_are_compared_whole(make_run: Any) -> None:
    runs = [make_run("one"), make_run("other", method="hs")]
    for run, rate in zip(runs, (1e-5, 3e-5), strict=True):
        rates = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, rate]
        finetuned(run, "sst2", [0.5], settings={"learning_rates": rates})
    (said,) = [note for note in notes_on(*runs) if "different learning_rates" in note]
    assert said.endswith("0.0006, 3e-05]")
