"""What fine-tuning found: scores and their spread, as JSON and as a table, and the results that are kept."""

from __future__ import annotations

import io
import json
import logging
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from student_train.evaluate.finetune.records import (
    FinetuneReport,
    ResultCache,
    SeedResult,
    finetune_table,
    identify,
    score_cells,
)


def seed_of(seed: int, **accuracy: float) -> SeedResult:
    measures = {name: {"accuracy": value, "f1": 0.1} for name, value in accuracy.items()}
    return SeedResult(seed=seed, learning_rate=10.0**-seed, measures=measures, cut={}, constant=())


REPORT = FinetuneReport(
    student="student",
    task="xnli",
    metric="accuracy",
    seeds=(seed_of(0, dev=0.8, de=0.6, sw=0.5), seed_of(1, dev=0.7, de=0.7, sw=0.3)),
    tests=("de", "sw"),
    examples={"train": 1000, "dev": 200, "de": 300, "sw": 400},
    settings={"learning_rates": [1.0, 0.1], "epochs": 3.0, "batch_size": 32, "max_length": 128},
    fingerprint="print",
)
ON_DEV = replace(REPORT, tests=())


def render(report: FinetuneReport) -> list[list[str]]:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(finetune_table("student", report))
    lines = captured.get().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_scores_are_means_over_the_test_sets_or_those_on_dev() -> None:
    assert REPORT.scores == pytest.approx([0.55, 0.5]) and REPORT.scores_on("sw") == [0.5, 0.3]
    assert ON_DEV.scores == [0.8, 0.7]


def test_json() -> None:
    record = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert record["mean"] == pytest.approx(0.525) and record["sd"] == pytest.approx(statistics.stdev([0.55, 0.5]))
    assert record["by_test"].keys() == {"de", "sw"} and record["by_test"]["de"]["scores"] == [0.6, 0.7]
    assert (record["seeds"], record["learning_rates"]) == ([0, 1], [1.0, 0.1])
    assert record["all_metrics"][1]["dev"] == {"accuracy": 0.7, "f1": 0.1}
    assert "by_test" not in ON_DEV.to_json()
    one = replace(ON_DEV, seeds=REPORT.seeds[:1]).to_json()
    assert (one["mean"], one["sd"]) == (0.8, None)


def test_a_line_for_each_set() -> None:
    lines = render(REPORT)
    assert lines[0] == ["xnli of student: accuracy × 100"]
    assert ["measured on", "seed 0", "seed 1", "mean ± sd"] in lines
    assert ["dev (200)", "80.00", "70.00", "75.00 ± 7.07"] in lines
    assert ["sw (400)", "50.00", "30.00", "40.00 ± 14.14"] in lines
    assert ["mean of the tests", "55.00", "50.00", "52.50 ± 3.54"] in lines
    assert ["best --lr on dev", "1", "0.1", ""] in lines
    caption = " ".join(line[0] for line in lines if len(line) == 1)
    assert "1,000 examples to train on, 3 epochs, batches of 32, --lr 1, 0.1, at most 128 tokens" in caption


def test_what_there_is_one_of_has_no_spread() -> None:
    report = replace(ON_DEV, seeds=REPORT.seeds[:1], settings={**REPORT.settings, "learning_rates": [1.0]})
    lines = render(report)
    assert ["measured on", "seed 0", "mean"] in lines and ["dev (200)", "80.00", "80.00"] in lines
    assert not any(line[0].startswith(("mean of", "best --lr")) for line in lines)
    assert score_cells([0.5]) == ["50.00", "50.00"]
    assert score_cells([0.5, 0.6]) == ["50.00", "60.00", "55.00 ± 7.07"]


# ---- results that are kept ------------------------------------------------------------------------------------------

KEY: dict[str, Any] = {"task": "sst2", "seed": 0, "settings": {"epochs": 3.0}}
RESULT = {"measures": {"dev": {"accuracy": 0.5}}, "cut": {}}


@pytest.fixture
def kept(tmp_path: Path) -> ResultCache:
    return ResultCache(tmp_path / "kept", names=("measures", "cut"))


def test_a_result_is_found_by_everything_that_decides_it(kept: ResultCache, tmp_path: Path) -> None:
    assert kept.find(KEY) is None
    kept.keep(KEY, RESULT)
    assert kept.find(KEY) == RESULT
    # the order of entries decides nothing
    assert kept.find({"settings": {"epochs": 3.0}, "seed": 0, "task": "sst2"}) == RESULT
    for other in ({**KEY, "seed": 1}, {**KEY, "settings": {"epochs": 3.5}}, {"task": "sst2", "seed": 0}):
        assert kept.find(other) is None
    assert [file.suffix for file in (tmp_path / "kept").iterdir()] == [".json"]
    assert ResultCache(tmp_path / "kept", names=("measures", "cut")).find(KEY) == RESULT


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", '{"result": {"measures": {}, "cut": {}}}', '{"key": {}, "result": {"measures": {}}}'),
        json.dumps({"key": KEY, "result": {"measures": {"dev": {"accuracy": "0.5"}}, "cut": {}}}),
        json.dumps({"key": KEY, "result": {"measures": {"dev": {"accuracy": 50}}, "cut": {}}}),
        json.dumps({"key": KEY, "result": {"measures": {"dev": {"accuracy": 0.5}}, "cut": {"dev": True}}}),
    ],
)
def test_damaged_and_foreign_files_count_as_none(kept: ResultCache, text: str) -> None:
    kept.keep(KEY, RESULT)
    (file,) = kept.folder.iterdir()
    file.write_text(text)
    assert kept.find(KEY) is None
    kept.keep(KEY, RESULT)
    assert kept.find(KEY) == RESULT


def test_results_of_an_older_version_lack_something(kept: ResultCache, tmp_path: Path) -> None:
    kept.keep(KEY, RESULT)
    assert ResultCache(tmp_path / "kept", names=("measures", "cut", "constant")).find(KEY) is None


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    kept = ResultCache(tmp_path / "file" / "kept", names=("measures", "cut"))
    with caplog.at_level(logging.WARNING):
        kept.keep(KEY, RESULT)
        kept.keep(KEY, RESULT)
    (record,) = caplog.records
    assert "results are not kept" in record.message and "--cache-dir" in record.message
    assert kept.find(KEY) is None


def test_keys_are_told_apart() -> None:
    assert identify({"a": 1, "b": 2}) == identify({"b": 2, "a": 1}) != identify({"a": 1, "b": 2.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        identify({"lr": float("nan")})
