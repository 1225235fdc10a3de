"""Manifests, commits and seals as somebody else could have written them: every impossible field is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.contract import manifest as records
from teacher_cache.contract import targets as specs
from teacher_cache.contract.manifest import Manifest
from teacher_cache.fields import check_fields
from teacher_cache.format import schema
from teacher_cache.format.protocol import Commit, ObjectDigest, Seal, write_checked
from teacher_cache.format.schema import SealSchema, check_manifest

Change = tuple[str, Any]


def forged_sinks(changes: dict[str, object]) -> dict[str, object]:
    return {"distance": 10.0, "share": 0.01, "variance": 0.9, "dtype": "float16", **changes}


FORGED: list[Change] = [
    ("rows", [40]), ("rows", 0), ("rows", 10**30), ("block_rows", 0), ("block_rows", -16), ("block_rows", 16.5),
    ("block_rows", "16"), ("block_rows", 10**6), ("seq_len", 0), ("seq_len", 24.0), ("seq_len", 10**9), ("views", 0),
    ("views", -1), ("views", 2.5), ("mlm_probability", float("nan")), ("mlm_probability", float("inf")),
    ("mlm_probability", "x"),
    ("mlm_probability", 0), ("mlm_probability", -0.1), ("temperature", "x"), ("temperature", -1), ("temperature", 0),
    ("teacher.hidden_size", "32"), ("teacher.layers", 10**9), ("teacher.layers", 0), ("teacher.heads", 0),
    ("teacher.heads", 10**9), ("teacher.vocab_size", "200"), ("teacher.vocab_size", 0), ("teacher.has_mlm_head", 1),
    ("teacher.weights_sha256", "../../x"), ("teacher.unknown", 1), ("calibration.hidden/4.step", 0),
    ("calibration.hidden/4.step", -1), ("calibration.hidden/4.step", "x"), ("calibration.hidden/4.nmse", float("nan")),
    ("calibration.hidden/4.components", {}), ("calibration.hidden/4.components", {"wide": -1}),
    ("calibration.hidden/4.components", {"wide": 10**9}), ("calibration.hidden/4.components", {"nope": 3}),
    ("targets.logits.entries", 0), ("targets.logits.entries", -1), ("targets.logits.entries", 8.5),
    ("targets.logits.entries", 10**9), ("targets.logits.entries", 201), ("targets.logits.view", "plain"),
    ("targets.logits.codec", "exact"), ("targets.hidden.0.layer", "../../x"), ("targets.hidden.0.layer", None),
    ("targets.hidden.0.layer", [2]), ("targets.hidden.0.layer", 5), ("targets.hidden.0.layer", 4),
    ("targets.hidden.0.codec", "nmse:nan"), ("targets.hidden.0.codec", "nmse:inf"), ("targets.hidden.0.codec", None),
    ("targets.hidden.0.codec", "nmse:0.010"), ("targets.hidden.0.view", "x"), ("targets.attention.0.layer", 0),
    ("targets.attention.0.heads", 0), ("targets.attention.0.heads", 4), ("targets.attention.0.widths", [32, 16, 16]),
    ("targets.attention.0.widths", [32, 16]), ("targets.attention.0.widths", [32, 0, 16]),
    ("targets.attention.0.form", "matrix"), ("targets.attention.0.form", "all"), ("corpus.specs", "text"),
    ("corpus.rows", -1), ("inputs_held", ["plain", "x"]), ("dtype", "int8"), ("format_version", True),
    ("row_mode", "any"), ("first_row", -1), ("seed", "0"), ("software", {"torch": 2}), ("command", None),
]  # fmt: skip
SINKS: list[object] = [
    {}, 1, *map(forged_sinks, [{"share": 0}, {"share": 2.0}, {"distance": 0.0}, {"distance": float("nan")},
                               {"variance": -1.0}, {"dtype": "float64"}, {"unknown": 1}]),
]  # fmt: skip
FORGED += [("calibration.hidden/4.sinks", value) for value in SINKS]


@pytest.fixture(scope="module")
def whole(nmse_store: Path) -> dict[str, Any]:
    """The manifest of a real store, without its checksum."""
    attributes: dict[str, Any] = json.loads((nmse_store / "zarr.json").read_text())["attributes"]
    attributes.pop("sha256")
    return attributes


def changed(whole: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    fields = copy.deepcopy(whole)
    # paths of streams have slashes, not dots
    *parts, last = place.split(".")
    inside: Any = fields
    for part in parts:
        inside = inside[int(part) if isinstance(inside, list) else part]
    inside[int(last) if isinstance(inside, list) else last] = value
    return fields


def test_the_manifest_of_a_real_store_passes(whole: dict[str, Any]) -> None:
    check_manifest(whole)
    assert Manifest.from_json(whole).to_json() == {**whole, **Manifest.from_json(whole).to_json()}


def test_sinks_are_a_field_of_streams_that_have_some_and_of_no_other(whole: dict[str, Any]) -> None:
    """What stores without sinks say, and hash, does not change."""
    assert "sinks" not in json.dumps(Manifest.from_json(whole).to_json()["calibration"])
    fields = changed(whole, "calibration.hidden/4.sinks", forged_sinks({}))
    check_manifest(fields)
    manifest = Manifest.from_json(fields)
    assert manifest.calibration["hidden/4"].sinks == records.SinkRecord(
        distance=10.0, share=0.01, variance=0.9, dtype="float16"
    )
    assert json.loads(json.dumps(manifest.to_json()["calibration"])) == fields["calibration"]


@pytest.mark.parametrize("place, value", FORGED)
def test_an_impossible_field_is_named_with_its_value(whole: dict[str, Any], place: str, value: object) -> None:
    with pytest.raises(ValueError, match="the field '") as caught:
        check_manifest(changed(whole, place, value))
    assert place.split(".")[0] in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("place", ["rows", "teacher.layers", "targets.hidden", "calibration.hidden/4.step"])
def test_a_missing_field_is_named(whole: dict[str, Any], place: str) -> None:
    fields = copy.deepcopy(whole)
    *parts, last = place.split(".")
    inside: Any = fields
    for part in parts:
        inside = inside[part]
    del inside[last]
    with pytest.raises(ValueError, match=f"the field '{place}' is missing"):
        check_manifest(fields)


@pytest.mark.parametrize(
    "described, record",
    [
        (schema.ManifestSchema, records.Manifest),
        (schema.TeacherSchema, records.TeacherRecord),
        (schema.CorpusSchema, records.CorpusRecord),
        (schema.TransformSchema, records.TransformRecord),
        (schema.SinkSchema, records.SinkRecord),
        (schema.TargetsSchema, specs.TargetSpecs),
        (schema.LogitsSchema, specs.LogitsSpec),
        (schema.HiddenSchema, specs.HiddenSpec),
        (schema.AttentionSchema, specs.AttentionSpec),
        (schema.DigestSchema, ObjectDigest),
        (schema.CommitSchema, Commit),
        (schema.SealSchema, Seal),
    ],
)
def test_every_field_of_a_record_is_described_and_no_other(described: Any, record: Any) -> None:
    assert set(described.model_fields) - {"format"} == {field.name for field in fields_of(record)}


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(block=-1),
        lambda fields: fields.update(block="0"),
        lambda fields: fields.update(rows=[0]),
        lambda fields: fields.update(rows=[0, 8.0]),
        lambda fields: fields.update(shards=[]),
        lambda fields: fields["shards"].update(a={"size": -1, "sha256": "0" * 64}),
        lambda fields: fields["shards"].update(a={"size": 1, "sha256": "x"}),
        lambda fields: fields["shards"].update({"../a": {"size": 1, "sha256": "0" * 64}}),
        lambda fields: fields.pop("shards"),
    ],
)
def test_commits(change: Callable[[dict[str, Any]], object]) -> None:
    fields: dict[str, Any] = {
        "block": 0,
        "rows": [0, 8],
        "shards": {"input_ids/c/0/0/0": {"size": 9, "sha256": "0" * 64}},
    }
    assert Commit.from_bytes(write_checked(fields)).rows == (0, 8)
    change(fields)
    with pytest.raises(ValueError):
        Commit.from_bytes(write_checked(fields))


@pytest.mark.parametrize(
    "place, value",
    [("rows", 0), ("blocks", -1), ("blocks", 2.0), ("bytes_per_array", {"a": -1}), ("objects", None), ("format", "x")],
)
def test_seals(place: str, value: object) -> None:
    fields: dict[str, Any] = {"format": "kdcache", "rows": 8, "blocks": 1, "bytes_per_array": {"input_ids": 9},
                              "objects": {}, "format_version": 1}  # fmt: skip
    check_fields(SealSchema, fields)
    assert Seal.from_bytes(write_checked(fields)).rows == 8
    with pytest.raises(ValueError, match=f"the field '{place}"):
        Seal.from_bytes(write_checked({**fields, place: value}))
