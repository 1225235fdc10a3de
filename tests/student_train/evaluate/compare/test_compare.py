"""Comparisons of runs: what counts as a repetition, what a difference is worth, what a reader is told is missing."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.significance import (
    PairedDifference,
    Scores,
    average_tasks,
    correct_holm,
    paired_difference,
    summarise,
)
from student_train.evaluate.compare.table import comparison_grids, markdown
from teacher_cache.errors import SettingsError, StudentError

# ---- statistics -----------------------------------------------------------------------------------------------------


def draws(trainings: int, seeds: int, level: float, seed: int) -> Scores:
    draw = np.random.default_rng(seed)
    return {t: {s: level + float(draw.normal(0, 0.02)) for s in range(seeds)} for t in range(trainings)}


def test_several_trainings_are_the_unit() -> None:
    """Against the textbook: a paired t-test of the trainings' means, whatever number of fine-tunings is behind them."""
    row, base = draws(4, 3, 0.7, 0), draws(4, 3, 0.68, 1)
    found = paired_difference(row, base)
    means = [[statistics.fmean(scores[t].values()) for t in range(4)] for scores in (row, base)]
    expected = stats.ttest_rel(*means)
    assert found is not None and found.unit == "training seed" and found.units == (0, 1, 2, 3) and not found.fixed
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.mean == pytest.approx(statistics.fmean(means[0]) - statistics.fmean(means[1]))


def test_one_training_is_tested_over_its_fine_tuning_seeds() -> None:
    row, base = {0: {0: 0.7, 1: 0.72, 2: 0.75}}, {0: {1: 0.7, 2: 0.71, 3: 0.1}}
    found = paired_difference(row, base)
    assert found is not None and (found.unit, found.units) == ("fine-tuning seed", (1, 2))
    assert found.mean == pytest.approx(0.03) and found.p == pytest.approx(stats.ttest_1samp([0.02, 0.04], 0).pvalue)


def test_without_scipy_seeds_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # as where it is not installed
    with pytest.raises(SettingsError, match=r"needs scipy.*4 seeds.*pip install 'kdcache\[eval\]'"):
        paired_difference(draws(4, 2, 0.7, 0), draws(4, 2, 0.6, 1))
    one = paired_difference({0: {0: 0.7}}, {0: {0: 0.6}})
    assert one is not None and one.p is None


def test_only_what_both_have_is_paired() -> None:
    row, base = draws(4, 2, 0.7, 0), draws(4, 2, 0.6, 1)
    assert paired_difference({t: row[t] for t in (0, 1, 3)}, {t: base[t] for t in (1, 2, 3)}).units == (1, 3)
    assert paired_difference({0: row[0], 1: row[1]}, {2: base[2], 3: base[3]}) is None
    assert paired_difference({0: {0: 0.5}}, {0: {1: 0.5}}) is None


def test_a_single_teacher_stands_against_every_training() -> None:
    row, teacher = draws(3, 2, 0.7, 0), {None: {0: 0.8, 1: 0.82}}
    found = paired_difference(row, teacher)
    assert found is not None and found.fixed and (found.unit, found.units) == ("training seed", (0, 1, 2))
    assert found.p == pytest.approx(
        stats.ttest_1samp([statistics.fmean(row[t].values()) - 0.81 for t in row], 0).pvalue
    )
    assert paired_difference(teacher, row).mean == pytest.approx(-found.mean)


@pytest.mark.parametrize("scores", [{0: {0: 0.7}}, {0: {0: 0.6 + 0.1, 1: 0.8, 2: 0.9}}])
def test_without_spread_nothing_is_tested(scores: Scores) -> None:
    """One unit; or differences that are the same but for rounding, of which a t-test would make certainty."""
    base = {0: {seed: score - 0.1 for seed, score in scores[0].items()}}
    found = paired_difference(scores, base)
    assert found is not None and found.mean == pytest.approx(0.1)
    assert found.p is None and found.low is None


def test_holm() -> None:
    """The example of the method: 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    given = [PairedDifference(unit="", units=(0, 1), mean=0, p=p) for p in (0.01, 0.04, 0.03, 0.005)]
    untested = PairedDifference(unit="", units=(0,), mean=0)
    corrected = correct_holm([given[0], None, *given[1:], untested])
    assert corrected[1] is None and corrected[-1] == untested
    assert [each.holm for each in corrected if each and each.p] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_summaries() -> None:
    trainings = {0: {0: 0.5, 1: 0.7}, 1: {0: 0.8, 1: 0.8}}
    found = summarise(trainings)
    assert (found.n, found.unit) == (2, "training seed")
    assert (found.mean, found.sd) == pytest.approx((0.7, statistics.stdev([0.6, 0.8])))
    assert summarise({0: {0: 0.5}}).sd is None
    assert average_tasks([trainings, {1: {1: 0.2, 5: 0.9}}]) == {1: {1: pytest.approx(0.5)}}


# ---- runs -----------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """`make_run(name, seed=0, scores=[...], **settings)`: a directory with records of a training and no weights."""

    def make(name: str, *, scores: list[float] | None = None, contents: str = "c", **settings: Any) -> Path:
        run = tmp_path / name
        run.mkdir()
        given = {"method": "mha", "cache": ["cache.zarr"], "out": name, "seed": 0, "steps": 10, "init": "auto"}
        cache = {"path": "cache.zarr", "identity_sha256": contents}
        write(run / "provenance.json", {"settings": {**given, **settings}, "cache": cache, "steps": 10})
        if scores is not None:
            finetuned(run, "sst2", scores)
        return run

    return make


def compare(*runs: Path, **options: Any) -> Any:
    return compare_runs([str(run) for run in runs], **options)


def test_trainings_that_differ_in_their_seed_are_one_row(make_run: Any) -> None:
    runs = [
        make_run("mha-0"),
        make_run("mha-1", seed=1, valid_every=3, device="cpu"),
        make_run("mha-lr", seed=2, lr=0.5),
        make_run("other-cache", seed=3, contents="d"),
        make_run("again", seed=1),
    ]
    found = compare(*runs)
    assert [row.name for row in found.rows] == ["mha-{0,1}", "mha-lr", "other-cache", "again"]
    assert found.rows[0].row.seeds == (0, 1)
    notes = "\n".join(found.notes)
    assert "trainings differ in --lr: " in notes and "mha-lr 0.5" in notes and "different caches" in notes
    assert "mha-0" in notes and "--valid-every" not in notes and "--seed" not in notes


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


def test_records_of_other_weights_do_not_count(make_run: Any, tiny_teacher_copy: Any) -> None:
    student = tiny_teacher_copy("bert")
    finetuned(student, "sst2", [0.9], fingerprints={"weights": "of the student that was here before"})
    found = compare(student)
    assert not found.tasks and "other weights" in found.notes[0]


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("finetune-sst2.json", "{", "cannot be read as JSON"),
        ("finetune-sst2.json", "[1]", "an object is expected"),
        ("finetune-sst2.json", '{"evaluation": "fidelity"}', "'evaluation' is 'fidelity'"),
        ("finetune-sst2.json", '{"evaluation": "finetune", "seeds": [0]}', "no entry 'scores'"),
        ("finetune-sst2.json", '{"evaluation": "finetune", "seeds": [0], "scores": [NaN]}', "'scores' holds nan"),
        ("finetune-sst2.json", '{"evaluation": "finetune", "seeds": [0, 0], "scores": [0.1, 0.2]}', "'seeds' [0, 0]"),
        ("latency.json", '{"evaluation": "latency", "measurements": [{"backend": 3}]}', "'backend' holds 3"),
        ("latency.json", '{"evaluation": "latency", "measurements": []}', "no entry 'parameters'"),
        ("fidelity.json", '{"evaluation": "fidelity", "relations": []}', "KeyError: 'hidden'"),
        ("provenance.json", '{"settings": {}}', "no entry 'cache'"),
        ("provenance.json", '{"settings": {"method": "mha"}, "cache": {}}', "'seed'"),
        ("provenance.json", '{"settings": {}, "cache": {}, "objective": []}', "'objective' holds []"),
        ("provenance.json", '{"settings": {"method": "nonsense", "seed": 0}, "cache": {}}', "'nonsense'"),
    ],
)
def test_what_is_no_record_is_refused_by_file_and_entry(make_run: Any, name: str, text: str, named: str) -> None:
    run = make_run("run")
    (run / name).write_text(text)
    with pytest.raises(StudentError) as refusal:
        compare(run)
    assert str(run / name) in str(refusal.value) and named in str(refusal.value)


def test_scores_of_different_metrics_are_not_compared(make_run: Any) -> None:
    one, other = make_run("one", scores=[0.5]), make_run("other", seed=1)
    finetuned(other, "sst2", [0.5], metric="f1")
    with pytest.raises(StudentError, match="'f1'.*'accuracy'"):
        compare(one, other)
    finetuned(other, "sst2", [0.5], settings={"epochs": 5}, fingerprints={"weights": "w", "dev": "d"})
    notes = "\n".join(compare(one, other).notes)
    assert "different epochs" in notes and "different dev data" in notes and "weights data" not in notes


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no run directory"):
        compare(tmp_path / "nowhere")
    with pytest.raises(StudentError, match="neither a model nor a record"):
        compare(tmp_path)


def test_json_is_finite(make_run: Any) -> None:
    record = compare(make_run("one", scores=[0.5, 0.6]), make_run("two", method="hs", scores=[0.4, 0.7])).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    difference = record["rows"][1]["differences"]["sst2"]
    assert difference["n"] == 2 and math.isclose(difference["mean"], 0.0, abs_tol=1e-12)
