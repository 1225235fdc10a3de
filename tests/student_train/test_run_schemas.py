"""Provenance as somebody else could have written it: what is shown, compared or computed with is what it must be."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.run_schemas import ProvenanceSchema
from teacher_cache.fields import check_fields

RECORD: dict[str, Any] = {
    "cache": {
        "path": "cache.zarr", "identity_sha256": "this", "rows": 1000,
        "teacher": {"name": "bert", "weights_sha256": "w", "layers": 12},
    },
    "settings": {"method": "mha"},
    "held_out_rows": {"first": 900, "count": 100},
    "student": {"description": "2x32", "copied": []},
    "objective": {"mha": {"pairs": [[2, 3]]}},
    "software": {"torch": "2.13.0"},
    "deepspeed": {"fp16": {}},
    "steps": 10, "git_revision": None, "created": "2026-01-01", "command": "kdtrain", "of_tomorrow": [1],
}  # fmt: skip


def test_what_kdtrain_writes_and_the_least_of_it() -> None:
    assert check_fields(ProvenanceSchema, RECORD).cache.teacher.name == "bert"
    assert check_fields(ProvenanceSchema, {"cache": {}, "settings": {}}).held_out_rows.count == 0


@pytest.mark.parametrize(
    "place, value",
    [
        ("cache", []), ("cache.rows", "many"), ("cache.rows", True), ("cache.rows", -1), ("cache.teacher", None),
        ("cache.teacher.name", 3), ("cache.path", ["a"]), ("cache.identity_sha256", 5), ("settings", None),
        ("held_out_rows", []), ("held_out_rows.count", 1.5), ("student", "2x32"), ("student.description", {}),
        ("objective", "mha"), ("software", ["torch"]), ("software.torch", 2), ("deepspeed", None), ("steps", "10"),
        ("git_revision", 1), ("created", 2026), ("command", ["kdtrain"]),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(place: str, value: object) -> None:
    def changed(record: Any, parts: list[str]) -> Any:
        return {**record, parts[0]: changed(record[parts[0]], parts[1:])} if parts else value

    with pytest.raises(ValueError, match=f"the field '{place}' is "):
        check_fields(ProvenanceSchema, changed(RECORD, place.split(".")))
