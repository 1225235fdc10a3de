"""The rows of a comparison: which trainings are repetitions of one, and what a row is called."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.compare.rows import Row, make_rows, other_differences, training_seed
from student_train.evaluate.run_records import TimingSetup, read_run
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.left_records import finetuned, timed


def rows_of(*runs: Path) -> list[Row]:
    return make_rows([read_run(str(run)) for run in runs])


def test_trainings_that_differ_in_their_seed_are_one_row(make_run: Any) -> None:
    rows = rows_of(
        make_run("mha-0"),
        make_run("mha-1", seed=1, valid_every=3, device="cpu"),
        make_run("mha-lr", seed=2, lr=0.5),
        make_run("other-cache", seed=3, contents="d"),
        make_run("again", seed=1),
    )
    assert [row.name for row in rows] == ["mha-{0,1}", "mha-lr", "other-cache", "again"]
    assert rows[0].seeds == (0, 1)
    found = other_differences(rows)
    assert "mha-lr 0.5" in found["--lr"] and any(each.startswith("mha-{0,1} ") for each in found["--lr"])
    # neither what does not change the result, nor what has a column of its own
    assert found.keys() == {"--lr"}


@pytest.mark.parametrize("changes", [{"steps": 20}, {"deepspeed": {"gradient_clipping": 2}}])
def test_other_steps_or_engines_are_other_rows(make_run: Any, changes: dict[str, Any]) -> None:
    one, other = make_run("one"), make_run("other", seed=1)
    path = other / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert len(rows_of(one, other)) == 2
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 10, "deepspeed": {}}))
    assert len(rows_of(one, other)) == 1


TRIMMED = {"choice": "kdeval trim --coverage 0.99", "kept": 100, "of": 200, "sha256": "x" * 64}


@pytest.mark.parametrize(
    "changes", [{"vocabulary": TRIMMED}, {"additions": {"method mha": {"package": "other", "version": "2"}}}]
)
def test_a_student_with_fewer_ids_or_of_another_package_is_another_row(make_run: Any, changes: dict[str, Any]) -> None:
    """In whatever order they are given: `kdeval trim` hands the settings of the training on."""
    whole = [make_run("a"), make_run("b", seed=1)]
    others = [make_run("c", seed=2), make_run("d", seed=3)]
    for run in others:
        path = run / "provenance.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for order in ([*whole, *others], [others[0], *whole, others[1]]):
        assert {frozenset(row.seeds) for row in rows_of(*order)} == {frozenset({0, 1}), frozenset({2, 3})}


def test_how_a_batch_is_cut_into_passes_does_not_matter(make_run: Any) -> None:
    runs = [make_run("one"), make_run("other", seed=1)]
    for run, size in zip(runs, (4, 8), strict=True):
        path = run / "provenance.json"
        engine = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": 32 // size, "fp16": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"deepspeed": engine}))
    assert len(rows_of(*runs)) == 1


def test_columns(make_run: Any) -> None:
    both, mha = rows_of(make_run("a", method="mha+hs", weights="1,0.1", mapping="last"), make_run("b", mapping="last"))
    assert (both.method, both.mapping, both.init) == ("mha+hs (1,0.1)", "last", "auto")
    # without hidden states a mapping means nothing
    assert (mha.method, mha.mapping) == ("mha", None)


def test_a_model_from_elsewhere(tiny_teacher: Any) -> None:
    (row,) = rows_of(tiny_teacher("bert"))
    assert (row.seeds, row.method, row.mapping, row.init) == ((None,), None, None, None)
    assert str(row.shape) == "4x32:4:64" and row.parameters == row.shape.parameters
    # nobody knows whether two of them come from the same training
    assert len(rows_of(tiny_teacher("bert"), tiny_teacher("bert", seed=1))) == 2


def test_scores_times_and_means(make_run: Any) -> None:
    runs = [make_run("a-0", scores=[0.5, 0.6]), make_run("a-1", seed=1, scores=[0.7]), make_run("a-2", seed=2)]
    finetuned(runs[2], "rte", [0.4])
    for run, milliseconds in zip(runs[:2], (3.0, 5.0), strict=True):
        timed(run, milliseconds)
    (row,) = rows_of(*runs)
    assert row.scores("sst2") == {0: {0: 0.5, 1: 0.6}, 1: {0: 0.7}}
    setup = TimingSetup(backend="pytorch", device="cpu", dtype="float32", threads=1, batch_size=1, seq_len=128)
    assert row.milliseconds(setup) == 4.0 and row.speedup(setup) == pytest.approx(statistics.fmean((24 / 3, 24 / 5)))
    other = TimingSetup(backend="pytorch", device="cuda", dtype="float32", threads=1, batch_size=1, seq_len=128)
    assert row.milliseconds(other) is None and row.speedup(other) is None
    assert row.parameters == 7_000_000
    assert row.mean(lambda run: float(training_seed(run) or 0)) == 1.0
    # a mean over some of the runs would be that of others
    assert row.mean(lambda run: None if training_seed(run) == 1 else 1.0) is None


def test_paths_name_rows_where_folders_are_called_alike(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    names = [row.name for row in rows_of(make_run("x/student"), make_run("y/student", method="hs"))]
    assert names == [str(tmp_path / "x" / "student"), str(tmp_path / "y" / "student")]


@pytest.mark.parametrize(
    "settings, named",
    [({"method": "mha"}, "seed'"), ({"method": "nonsense", "seed": 0}, "'nonsense'"), ({"seed": True}, "seed'")],
)
def test_settings_that_are_none_of_kdtrain(make_run: Any, settings: dict[str, Any], named: str) -> None:
    run = make_run("run")
    (run / "provenance.json").write_text(json.dumps({"settings": settings, "cache": {}}))
    with pytest.raises(StudentError, match=f"provenance.json' is no record of kdtrain.*{named}"):
        rows_of(run)
