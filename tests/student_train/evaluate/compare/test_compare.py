"""Comparisons of runs: what counts as a repetition, what a difference is worth, what a reader is told is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.table import comparison_grids, markdown
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.left_records import finetuned, timed, write


def compare(*runs: Path, **options: Any) -> Any:
    return compare_runs([str(run) for run in runs], **options)


def test_scores_and_differences(make_run: Any) -> None:
    for seed, level in enumerate((0.70, 0.72, 0.71)):
        finetuned(make_run(f"a-{seed}", seed=seed, scores=[level, level + 0.02]), "rte", [0.5, 0.5 + level / 10])
        finetuned(
            make_run(f"b-{seed}", seed=seed, method="hs", scores=[level - 0.1, level - seed / 50]), "rte", [0.5, 0.5]
        )
    folder = make_run("c", method="mlm", scores=[0.6, 0.61]).parent
    found = compare(
        *(folder / name for name in ("c", "a-0", "b-0", "a-1", "b-1", "a-2", "b-2")), baseline=str(folder / "b-1")
    )
    assert [row.name for row in found.rows] == ["c", "a-{0,1,2}", "b-{0,1,2}"] and found.baseline == "b-{0,1,2}"
    c, a, b = found.rows
    assert a.scores["sst2"].mean == pytest.approx(0.72) and a.scores["sst2"].n == 3
    assert a.scores["average"].mean == pytest.approx((a.scores["sst2"].mean + a.scores["rte"].mean) / 2)
    assert a.differences["sst2"].mean == pytest.approx(a.scores["sst2"].mean - b.scores["sst2"].mean)
    low, high = sorted((row.differences["sst2"] for row in (a, c)), key=lambda each: each.p)
    assert (low.holm, high.holm) == pytest.approx((2 * low.p, max(2 * low.p, high.p)))
    assert a.differences["rte"].holm == a.differences["rte"].p  # c has no rte: one comparison
    assert "average" not in c.scores and set(c.differences) == {"sst2"} and not b.differences
    assert any(note.startswith("no rte of") and "kdeval finetune" in note for note in found.notes)
    written = json.loads(json.dumps(a.to_json()["scores_by_run"]))
    assert set(written) == {"rte", "sst2"} and written["sst2"][str(folder / "a-1")] == {"0": 0.72, "1": 0.74}
    text = markdown(found)
    assert "| 72.00 ± 1.00 |" in text and "3 training seeds" in text and "Holm" in text
    line = next(line for line in comparison_grids(found)[0].lines if line[0] == "c")
    assert "–" in line and "60.50 ± 0.71" in line


def test_latency_is_of_what_all_rows_were_timed_on(make_run: Any, tmp_path: Path) -> None:
    timed(make_run("fast"), 3.0)
    timed(make_run("slow", method="hs"), 6.0)
    make_run("untimed", method="od")
    found = compare(*(tmp_path / name for name in ("fast", "slow", "untimed")))
    assert found.setup is not None and found.setup.batch_size == 1
    assert [(row.latency_ms, row.speedup) for row in found.rows] == [(3, 8), (6, 4), (None, None)]
    assert any(note.startswith("no latency") and note.count("untimed") == 1 for note in found.notes)
    timed(tmp_path / "slow", 6.0, hardware={"cpu": "another"})
    assert any("different hardware" in note for note in compare(tmp_path / "fast", tmp_path / "slow").notes)


def test_the_time_of_a_shape_is_that_of_all_its_rows(make_run: Any, tiny_teacher: Any, tmp_path: Path) -> None:
    config = json.loads((tiny_teacher("bert") / "config.json").read_text())
    for name, method, changes in (("b", "mha", {}), ("a", "hs", {}), ("thin", "od", {"intermediate_size": 32})):
        write(make_run(name, method=method) / "config.json", config | changes)
    timed(tmp_path / "a", 3.0)
    found = compare(*(tmp_path / name for name in ("b", "a", "thin")))
    assert [(row.latency_ms, row.timed_as) for row in found.rows] == [(3.0, "a"), (3.0, None), (None, None)]
    assert found.rows[0].speedup == 8 and found.rows[0].to_json()["timed_as"] == "a"
    assert any(
        note.startswith("no latency") and "thin" in note and note.count(str(tmp_path)) == 1 for note in found.notes
    )
    text = markdown(found)
    assert "| 3 ‡ | 8.00× |" in text and "‡: not timed so itself" in text
    assert "‡" not in markdown(compare(tmp_path / "a"))


def test_a_teacher_has_the_time_that_its_students_measured(make_run: Any, tiny_teacher: Any) -> None:
    from student_train.evaluate.load import weights_fingerprint

    teacher = tiny_teacher("bert")
    student = make_run("student", scores=[0.5])
    timed(student, 3.0, fingerprints={"teacher": weights_fingerprint(teacher)})
    found = compare(teacher, student)
    assert (found.rows[0].latency_ms, found.rows[0].speedup) == (24.0, 1.0)
    assert found.rows[0].to_json()["shape"] == "4x32:4:64" and found.rows[0].row.method is None


def test_a_student_that_teaches_another_keeps_its_own_speedup(make_run: Any, tiny_teacher_copy: Any) -> None:
    from student_train.evaluate.load import weights_fingerprint

    middle, student = tiny_teacher_copy("bert"), make_run("student", scores=[0.5])
    timed(middle, 12.0, fingerprints={"student": weights_fingerprint(middle), "teacher": "of a large one"})
    timed(student, 3.0, fingerprints={"teacher": weights_fingerprint(middle)})
    found = compare(middle, student)
    assert [(row.latency_ms, row.speedup) for row in found.rows] == [(12.0, 2.0), (3.0, 8.0)]
    assert any(note.startswith("speed-ups are over different teachers") for note in found.notes)
    # what lies beside the weights does not make them others
    (middle / "training_args.bin").write_bytes(b"of the Trainer")
    assert compare(middle, student).rows[0].latency_ms == 12.0


def test_scores_of_different_metrics_are_not_compared(make_run: Any) -> None:
    one, other = make_run("one", scores=[0.5]), make_run("other", seed=1)
    finetuned(other, "sst2", [0.5], metric="f1")
    with pytest.raises(StudentError, match="'f1'.*'accuracy'"):
        compare(one, other)
    finetuned(other, "sst2", [0.5], settings={"epochs": 5}, fingerprints={"weights": "w", "dev": "d"})
    notes = "\n".join(compare(one, other).notes)
    assert "different epochs" in notes and "different dev data" in notes and "weights data" not in notes


def test_json_is_finite(make_run: Any) -> None:
    record = compare(make_run("one", scores=[0.5, 0.6]), make_run("two", method="hs", scores=[0.4, 0.7])).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    difference = record["rows"][1]["differences"]["sst2"]
    assert difference["n"] == 2 and math.isclose(difference["mean"], 0.0, abs_tol=1e-12)


def test_what_is_no_run_or_a_broken_one_is_left_out_and_said(make_run: Any, tmp_path: Path) -> None:
    """As of `students/*` while a sweep runs: its summary, a training that has no student yet, damaged records."""
    for name in ("a", "b"):
        make_run(name, method="mha" if name == "a" else "hs", scores=[0.5, 0.6])
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "in-training").mkdir()
    (tmp_path / "in-training" / "metrics.jsonl").write_text("")
    broken = make_run("Broken", scores=[0.5])
    (broken / "provenance.json").write_text("{")
    matched = sorted(path for path in tmp_path.iterdir() if path.name in (
        "Broken", "a", "b", "in-training", "summary.json", "missing"
    ))  # fmt: skip
    found = compare(*matched, tmp_path / "missing")
    assert [row.name for row in found.rows] == ["a", "b"] and found.baseline == "a"
    left_out = [note for note in found.notes if note.startswith("left out: ")]
    for told in (
        f"'{tmp_path / 'summary.json'}' is a file, and no run",
        f"'{tmp_path / 'in-training'}' holds neither a model nor a record of one",
        f"'{broken / 'provenance.json'}'",
        f"no run directory '{tmp_path / 'missing'}'",
    ):
        assert sum(told in note for note in left_out) == 1
    assert len(left_out) == 4
    # what is asked for by name, and nothing at all, is an error
    with pytest.raises(StudentError, match="provenance.json"):
        compare(tmp_path / "a", baseline=str(broken))
    with pytest.raises(StudentError, match=r"(?s)nothing is left to compare:\nleft out: .*\nleft out: "):
        compare(tmp_path / "summary.json", broken)
    with pytest.raises(StudentError, match="is a file, and no run"):
        compare(tmp_path / "summary.json")
