"""The record of kept ids and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.students.vocabulary.kept_ids import KEPT_IDS, KeptIds, read_kept_ids
from teacher_cache.errors import StudentError


def test_numbers() -> None:
    kept = KeptIds.of([9, 4, 2, 4], 12, 3)
    assert (kept.ids_K.tolist(), len(kept), kept.own_stand_in) == ([2, 3, 4, 9], 4, 1)
    assert kept.own_V.tolist() == [4, 4, 0, 1, 2, 4, 4, 4, 4, 3, 4, 4]
    assert [kept.own(each) for each in (9, 5, 12, -1, None, True)] == [3, None, None, None, None, None]


def test_some_of_some() -> None:
    first = KeptIds.of([2, 3, 5, 8, 9], 12, 3)
    second = KeptIds.of([0, 1, 4], 5, 1)
    assert first.of_kept(second).to_json() == KeptIds.of([2, 3, 9], 12, 3).to_json()


def test_file(tmp_path: Path) -> None:
    assert read_kept_ids(tmp_path) is None
    kept = KeptIds.of([1, 5], 7, 5)
    kept.write(tmp_path)
    for place in (tmp_path, tmp_path / KEPT_IDS):
        found = read_kept_ids(place)
        assert found is not None and found.sha256 == kept.sha256
    assert kept.sha256 != KeptIds.of([1, 5], 8, 5).sha256


@pytest.mark.parametrize(
    "change, told",
    [
        ({"version": 2}, "version 2"),
        ({"kept_ids": []}, "ascending"),
        ({"kept_ids": [5, 1]}, "ascending"),
        ({"kept_ids": [1, 5, 7]}, "below 7"),
        ({"kept_ids": [-1, 5]}, "kept_ids"),
        ({"kept_ids": "15"}, "kept_ids"),
        ({"stand_in": 2}, "stand_in 2"),
        ({"teacher_vocab_size": None}, "teacher_vocab_size"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    fields = {**KeptIds.of([1, 5], 7, 5).to_json(), **change}
    (tmp_path / KEPT_IDS).write_text(json.dumps(fields))
    with pytest.raises(StudentError, match=f"kept_ids.json' cannot be read.*{told}"):
        read_kept_ids(tmp_path)
