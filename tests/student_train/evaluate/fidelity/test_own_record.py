"""What a student's own provenance says of its training, and what in it cannot be true."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from student_train.data.split import held_out_rows
from student_train.evaluate.fidelity.own_record import (
    DEFAULT_SHARE,
    expected_count,
    held_out_by_store,
    layer_pairs_of,
    own_record_problem,
)

RECORD: dict[str, Any] = {
    "cache": {"path": "cache.zarr", "identity_sha256": "this", "rows": 1000},
    "held_out_rows": {"first": 900, "count": 100},
    "objective": {
        "mha": {"pairs": [[2, 3]], "relation_heads": 8},
        "hs": {"mapping": "last1", "pairs": [[2, 4]]},
    },
}


def problem(record: dict[str, Any]) -> str | None:
    """Of a student of 2 layers of 24, whose teacher is 32 wide."""
    return own_record_problem(record, (32,) * 3, 2, (24,) * 3)


def changed(path: str, value: Any) -> dict[str, Any]:
    record = deepcopy(RECORD)
    *folders, name = path.split(".")
    place = record
    for folder in folders:
        place = place[folder]
    place[name] = value
    return record


def test_records_of_kdtrain_are_believed() -> None:
    assert problem(RECORD) is None
    assert problem({}) is None, "a model from elsewhere says nothing"
    assert problem({**RECORD, "objective": {}}) is None
    # a mapping that weighs all pairs of layers names none
    assert problem(changed("objective.hs", {"mapping": "emd"})) is None
    stores = [{"identity_sha256": "a", "held_out": 0}, {"identity_sha256": "b", "held_out": 100}]
    assert problem(changed("cache.stores", stores)) is None


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("cache", [], "the field 'cache' is []: it must be an object"),
        ("cache", None, "the field 'cache' is None: it may be left out, but not be null"),
        ("objective", "mha", "the field 'objective' is 'mha': it must be an object"),
        ("held_out_rows.count", 1001, "the count 1001 of 1000 rows"),
        ("held_out_rows.count", 0, "the field 'held_out_rows.count' is 0: it must be a number of at least 1"),
        ("held_out_rows.count", 99, "the first 900 and the count 99 of 1000 rows"),
        ("held_out_rows.first", 901, "the first 901 and the count 100 of 1000 rows"),
        ("cache.rows", True, "the field 'cache.rows' is True"),
        ("cache.rows", "many", "the field 'cache.rows' is 'many': it must be a whole number"),
        ("cache.stores", {"a": 1}, "the field 'cache.stores' is {'a': 1}: it must be a list"),
        ("cache.stores", [{"held_out": -1}], "the field 'cache.stores.0.held_out' is -1"),
        ("cache.stores", [{"held_out": 60}, {"held_out": 39}], "the stores of its cache hold out [60, 39]"),
        ("objective.mha", ["pairs"], "the field 'objective.mha' is ['pairs']"),
        ("objective.mha.pairs", [], "the field 'objective.mha.pairs' is []"),
        ("objective.mha.pairs", [[3, 3]], "mha has layer 3 of a student of 2"),
        ("objective.mha.pairs", [[2]], "the field 'objective.mha.pairs.0.1' is missing"),
        ("objective.mha.relation_heads", 16, "mha has 16 relation heads, which do not divide"),
        ("objective.mha.relation_heads", 3, "mha has 3 relation heads"),
        ("objective.mha.relation_heads", None, "the field 'objective.mha.relation_heads' is None"),
        ("objective.hs", {"mapping": "last1"}, "hs has the mapping 'last1' and no pairs"),
        ("objective.hs.pairs", [[0, 4]], "the field 'objective.hs.pairs.0.0' is 0"),
        ("objective.hs.pairs", None, "the field 'objective.hs.pairs' is None"),
    ],
)
def test_what_cannot_be_true_is_said(path: str, value: Any, said: str) -> None:
    assert said in str(problem(changed(path, value)))


def test_how_many_rows_are_held_out() -> None:
    """By the record where the cache has as many rows; else as many as kdtrain would hold out."""
    assert expected_count(RECORD, 1000) == 100
    assert expected_count(RECORD, 500) == held_out_rows(500, DEFAULT_SHARE) == 10
    assert expected_count({}, 1) == 1


def test_held_out_rows_of_each_store() -> None:
    assert held_out_by_store({}) == {}
    assert held_out_by_store(RECORD) == {"this": 100}
    stores = [{"identity_sha256": name, "held_out": count} for name, count in (("a", 60), ("b", 0))]
    assert held_out_by_store(changed("cache.stores", stores)) == {"a": 60, "b": 0}


def test_pairs_of_layers() -> None:
    assert layer_pairs_of(RECORD["objective"]["mha"]) == ((2, 3),)
    assert layer_pairs_of({"mapping": "emd"}) == () == layer_pairs_of(None)
