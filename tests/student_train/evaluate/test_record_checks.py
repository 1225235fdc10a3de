"""Reading the JSON of measurements: what is as it should be comes back, all else is refused by file and entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.record_checks import check, duration, get, number, read_object
from teacher_cache.errors import StudentError

FILE = Path("run") / "latency.json"


def test_what_is_right_comes_back(tmp_path: Path) -> None:
    record = {"seeds": [0], "task": "sst2", "threads": 2, "settings": {}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_object(tmp_path / "record.json") == record
    for name, kind in {"seeds": list, "task": str, "threads": int, "settings": dict}.items():
        assert get(record, name, kind, FILE) == record[name]
    assert number(3, FILE, "score") == 3.0 and isinstance(number(3, FILE, "score"), float)
    assert number(-0.5, FILE, "score") == -0.5 and duration(0.25, FILE, "median_ms") == 0.25


@pytest.mark.parametrize(
    "value, kind, said",
    [
        ("3", int, "'entry' holds '3' where a whole number is expected"),
        # True is an int to Python, and no number of threads
        (True, int, "'entry' holds True where a whole number"),
        (3, str, "'entry' holds 3 where text"),
        ({}, list, "'entry' holds {} where a list"),
        ([], dict, r"'entry' holds \[\] where an object"),
        (None, dict, "'entry' holds None where an object"),
    ],
)
def test_entries_of_another_kind(value: Any, kind: type, said: str) -> None:
    with pytest.raises(StudentError, match=f"run/latency.json' is no record of ours.*{said}.*delete it and measure"):
        check(value, kind, FILE, "entry")


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), float("inf"), [0.5]])
def test_what_is_no_finite_number(value: Any) -> None:
    for read in (number, duration):
        with pytest.raises(StudentError, match="'score' holds .* where a finite number is expected"):
            read(value, FILE, "score")


@pytest.mark.parametrize("value", [0, -1.5])
def test_no_time_is_zero_or_less(value: float) -> None:
    with pytest.raises(StudentError, match="'median_ms' holds .* where a time above 0 is expected"):
        duration(value, FILE, "median_ms")


def test_entries_that_lack_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="it has no entry 'seeds'"):
        get({}, "seeds", list, FILE)
    with pytest.raises(StudentError, match="nowhere.json' cannot be read as JSON"):
        read_object(tmp_path / "nowhere.json")
    (tmp_path / "cut.json").write_text('{"seeds": [')
    with pytest.raises(StudentError, match="cut.json' cannot be read as JSON"):
        read_object(tmp_path / "cut.json")
    # a large value does not fill the screen
    (tmp_path / "list.json").write_text(json.dumps(list(range(1000))))
    with pytest.raises(StudentError, match="where an object is expected") as refusal:
        read_object(tmp_path / "list.json")
    assert len(str(refusal.value)) < 400
