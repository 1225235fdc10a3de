"""Causal students side by side: text, tasks of the harness, speed of answers, and what makes them hard to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.table import comparison_grids, markdown
from student_train.evaluate.load import weights_fingerprint
from tests.student_train.evaluate.causal_models import make_causal
from tests.student_train.evaluate.left_records import answered, harnessed, read_text


def compare(*runs: Path) -> Any:
    return compare_runs([str(run) for run in runs])


def test_measures_of_each_row(make_run: Any) -> None:
    """Trainings that differ in their seed are one row, which has the mean."""
    runs = []
    for name, seed, bits in (("a-0", 0, 2.0), ("a-1", 1, 3.0), ("b", 0, 4.0)):
        run = make_run(name, seed=seed, method="lm" if name == "b" else "od")
        read_text(run, bits)
        harnessed(run, {"animals": bits / 10, "plants": 0.5} if name != "a-1" else {"animals": bits / 10})
        answered(run, 100 * bits)
        runs.append(run)
    found = compare(*runs)
    a, b = (row.causal for row in found.rows)
    assert (a.bits_per_byte, b.bits_per_byte) == pytest.approx((2.5, 4.0))
    assert (a.perplexity, b.perplexity) == pytest.approx(((2.0**4 + 2.0**6) / 2, 2.0**8))
    assert a.lm_eval == pytest.approx({"animals acc": 0.25})  # plants of one of two trainings
    assert b.lm_eval == pytest.approx({"animals acc": 0.4, "plants acc": 0.5})
    assert found.generation is not None and found.generation.batch_size == 1  # the smallest, as for passes
    assert (a.tokens_per_second, b.tokens_per_second, a.first_token_ms) == pytest.approx((62.5, 100, 8))
    assert (a.speedup, b.speedup) == pytest.approx((1.25, 2))
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["generation_setup"]["prompt_tokens"] == 128 and record["latency_setup"] is None
    assert record["rows"][1]["bits_per_byte"] == pytest.approx(4) and record["rows"][1]["generation"]["speedup"] == 2
    grid = comparison_grids(found)[0]
    assert grid.columns[-7:] == (
        "bits/byte", "perplexity", "animals acc", "plants acc", "first ms", "tokens/s", "speed-up",
    )  # fmt: skip
    assert grid.lines[1][-7:] == ("4.000", "256.00", "0.400", "0.500", "8", "100", "2.00×")
    assert "32 tokens after a prompt of 128" in markdown(found)


def test_a_perplexity_beyond_all_numbers(make_run: Any) -> None:
    run = make_run("a", method="od")
    read_text(run, 600.0)
    found = compare(run)
    (row,) = json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"]
    assert row["perplexity"] is None and row["bits_per_byte"] == pytest.approx(600)
    assert "| inf |" in markdown(found)


def test_a_teacher_has_what_was_measured_beside_its_students(make_run: Any, tmp_path: Path) -> None:
    teacher = make_causal(tmp_path / "teacher", "llama")
    weights = weights_fingerprint(teacher)
    run = make_run("a")
    read_text(run, 2.0, fingerprints={"teacher": weights, "text": "text", "vocabulary": "v"})
    answered(run, 400.0, fingerprints={"teacher": weights})
    student, row = compare(run, teacher).rows
    assert (row.causal.bits_per_byte, row.causal.perplexity) == pytest.approx((1, 4))
    assert (row.causal.first_token_ms, row.causal.tokens_per_second, row.causal.speedup) == (16, 50, 1)
    assert student.causal.speedup == 2
    assert not any("no perplexity" in note or "no latency" in note for note in compare(run, teacher).notes)


def test_what_is_missing_and_what_is_not_alike(make_run: Any, tmp_path: Path) -> None:
    bare = make_causal(tmp_path / "bare", "llama")
    runs = [make_run("a"), make_run("b", method="od")]
    read_text(runs[0], 2.0)
    read_text(runs[1], 2.0, seq_len=128, fingerprints={"teacher": "t", "text": "other text", "vocabulary": "w"})
    harnessed(runs[0], {"animals": 0.5}, dtype="bfloat16", harness="0.3.0")
    harnessed(runs[1], {"animals": 0.5}, results=harnessed(runs[1], {"animals": 0.5, "plants": 0.1}).results)
    notes = "\n".join(compare(*runs, bare).notes)
    assert f"no perplexity of {bare}: run `kdeval perplexity --student RUN --text FILE`" in notes
    assert f"no animals of {bare}: run `kdeval lm-eval --student RUN --tasks animals,plants`" in notes
    assert f"no plants of {runs[0]}, {bare}" in notes
    assert "perplexity was measured on different text" in notes
    assert "perplexity was measured in different windows" in notes
    assert "perplexities are of different tokenizers, bits per byte compare" in notes
    assert "lm-evaluation-harness asked different questions" in notes
    assert f"or ran in different numbers: {runs[0]}: 0.3.0 in bfloat16; {runs[1]}: 0.4.13 in float32" in notes
    assert "kdeval finetune" not in notes and "no latency" in notes


def test_encoders_are_told_nothing_of_it(make_run: Any) -> None:
    found = compare(make_run("a", scores=[0.5]), make_run("b", method="hs", scores=[0.6]))
    assert not any("perplexity" in note or "lm-eval" in note for note in found.notes)
    assert "bits/byte" not in comparison_grids(found)[0].columns
