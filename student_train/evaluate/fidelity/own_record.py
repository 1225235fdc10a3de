"""What a student's own provenance says of its training: which rows it held out, which layers it learned from.

The record was written by `kdtrain`, but it lies in a folder that anyone may have edited. `own_record_problem` says what
in it cannot be true; such a record is then not used at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from student_train.data.split import held_out_rows
from student_train.layer_map import WEIGHING_ALL, LayerPairs
from teacher_cache.fields import NOT_NULL, Count, OpenFields, Text, check_fields

DEFAULT_SHARE = 0.02


Number = Annotated[int, Field(ge=1, le=2**48)]
Pairs = list[Annotated[tuple[Number, Number], Field(strict=False)]]


class _Store(OpenFields):
    identity_sha256: Text | None = None
    held_out: Count


class _Cache(OpenFields):
    path: Text | None = None
    identity_sha256: Text | None = None
    rows: Number
    stores: list[_Store] = Field(default_factory=list)


class _HeldOut(OpenFields):
    first: Count | None = None
    count: Number


class _Relations(OpenFields):
    pairs: Annotated[Pairs, Field(min_length=1)]
    relation_heads: Number
    key_value_heads: Annotated[Number | None, NOT_NULL] = None
    relation_mask: Annotated[Literal["causal", "full"] | None, NOT_NULL] = None


class _Hidden(OpenFields):
    mapping: Text | None = None
    pairs: Annotated[Pairs | None, NOT_NULL] = None


class _Objective(OpenFields):
    mha: _Relations | None = None
    hs: _Hidden | None = None


class OwnRecordSchema(OpenFields):
    """Of `provenance.json`, what decides what is measured, and where. A model from elsewhere has none of it."""

    cache: Annotated[_Cache | None, NOT_NULL] = None
    held_out_rows: Annotated[_HeldOut | None, NOT_NULL] = None
    objective: _Objective = _Objective()


def own_record_problem(
    provenance: Mapping[str, Any], taught_widths: Sequence[int], layers: int, widths: Sequence[int]
) -> str | None:
    """What is wrong with a record whose entries are not those that `kdtrain` writes; None if nothing is.

    Widths are those of queries, keys and values of teacher and student; `layers` the student's depth.
    """
    try:
        record = check_fields(OwnRecordSchema, {name: value for name, value in provenance.items() if value != {}})
    except ValueError as error:
        return str(error)
    mha, hs = record.objective.mha, record.objective.hs
    if record.cache is not None and (problem := _held_out_problem(record.cache, record.held_out_rows)):
        return problem
    heads = 1 if mha is None else mha.relation_heads
    others = heads if mha is None or mha.key_value_heads is None else mha.key_value_heads
    for count, taught, own in zip((heads, others, others), taught_widths, widths, strict=True):
        if taught % count or own % count:
            return f"mha has {count} relation heads, which do not divide the widths {taught} and {own}"
    # a mapping that weighs all pairs of layers names none
    if hs is not None and hs.pairs is None and hs.mapping not in WEIGHING_ALL:
        return f"hs has the mapping {hs.mapping!r} and no pairs"
    for name, pairs in (("mha", mha and mha.pairs), ("hs", hs and hs.pairs)):
        beyond = [student for student, _ in pairs or [] if student > layers]
        if beyond:
            return f"{name} has layer {beyond[0]} of a student of {layers}"
    return None


def _held_out_problem(cache: _Cache, held_out: _HeldOut | None) -> str | None:
    if held_out is None or held_out.count > cache.rows:
        return f"held_out_rows has the count {held_out and held_out.count} of {cache.rows} rows"
    if cache.stores:
        counts = [store.held_out for store in cache.stores]
        if sum(counts) != held_out.count:
            return f"held_out_rows has the count {held_out.count}, and the stores of its cache hold out {counts}"
    elif held_out.first is not None and held_out.first + held_out.count != cache.rows:
        return f"held_out_rows has the first {held_out.first} and the count {held_out.count} of {cache.rows} rows"
    return None


def expected_count(provenance: Mapping[str, Any], rows: int) -> int:
    """How many of the rows are held out in all, as far as their number can tell."""
    # a store that was built again or got more targets has the same rows in the same order: its last ones are the same
    if provenance.get("cache", {}).get("rows") == rows:
        return int(provenance["held_out_rows"]["count"])
    return held_out_rows(rows, DEFAULT_SHARE) if rows > 1 else rows


def held_out_by_store(provenance: Mapping[str, Any]) -> dict[str, int]:
    """How many of its last rows the training held out of each store, by the hash of the store's contents."""
    cache = provenance.get("cache", {})
    if not cache:
        return {}
    stores = cache.get("stores") or [{**cache, "held_out": provenance["held_out_rows"]["count"]}]
    return {str(store.get("identity_sha256")): int(store["held_out"]) for store in stores}


def layer_pairs_of(trained: Mapping[str, Any] | None) -> LayerPairs:
    """The pairs (student layer, teacher layer) that a method was trained with; none if it was not."""
    return tuple((student, teacher) for student, teacher in trained.get("pairs", [])) if trained else ()
