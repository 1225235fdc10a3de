"""What a student's own provenance says of its training: which rows it held out, which layers it learned from.

The record was written by `kdtrain`, but it lies in a folder that anyone may have edited. `own_record_problem` says what
in it cannot be true; such a record is then not used at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student_train.data.split import held_out_rows
from student_train.layer_map import WEIGHING_ALL, LayerPairs

DEFAULT_SHARE = 0.02


def own_record_problem(provenance: Mapping[str, Any], teacher_width: int, layers: int, width: int) -> str | None:
    """What is wrong with a record whose entries are not those that `kdtrain` writes; None if nothing is."""
    cache, held_out, objective = (provenance.get(name, {}) for name in ("cache", "held_out_rows", "objective"))
    if not all(isinstance(section, Mapping) for section in (cache, held_out, objective)):
        return "cache, held_out_rows or objective is not an object"
    if cache and not (_is_number(cache.get("rows")) and _is_number(held_out.get("count"), cache["rows"])):
        return f"held_out_rows has the count {held_out.get('count')!r} of {cache.get('rows')!r} rows"
    if not _are_stores(cache.get("stores", [])):
        return f"the stores of its cache are {cache['stores']!r}"
    mha, hs = objective.get("mha"), objective.get("hs")
    if mha is not None and not _is_relation(mha, teacher_width, layers, width):
        return f"mha is {mha!r}"
    if hs is not None and not _is_mapping(hs, layers):
        return f"hs is {hs!r}"
    return None


def _are_stores(stores: object) -> bool:
    return isinstance(stores, list) and all(
        isinstance(store, Mapping) and _is_number(store.get("held_out"), least=0) for store in stores
    )


def _is_number(value: object, most: int | None = None, *, least: int = 1) -> bool:
    return isinstance(value, int) and value >= least and (most is None or value <= most)


def _is_relation(mha: object, teacher_width: int, layers: int, width: int) -> bool:
    if not isinstance(mha, Mapping) or not mha.get("pairs") or not _are_pairs(mha["pairs"], layers):
        return False
    heads = mha.get("relation_heads")
    return isinstance(heads, int) and heads >= 1 and teacher_width % heads == 0 and width % heads == 0


def _is_mapping(hs: object, layers: int) -> bool:
    # a mapping that weighs all pairs of layers names none
    return isinstance(hs, Mapping) and _are_pairs(
        hs.get("pairs", [] if hs.get("mapping") in WEIGHING_ALL else None), layers
    )


def _are_pairs(pairs: object, layers: int) -> bool:
    return isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0], layers) and _is_number(pair[1])
        for pair in pairs
    )


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
