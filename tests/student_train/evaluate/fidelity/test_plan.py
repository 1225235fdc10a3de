"""What is compared: layers, heads and rows, by the student's own record or by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from student_train.evaluate.fidelity.plan import FidelityPlan, HiddenPair, RelationPair, plan_fidelity
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import AttentionSpec
from tests.student_train.evaluate.manifests import make_manifest


def plan(manifest: Manifest, **changes: Any) -> FidelityPlan:
    settings: dict[str, Any] = {
        "stores": [("this", manifest.rows)],
        "student_layers": 2,
        "student_width": 24,
        "has_head": True,
        "provenance": {},
    }
    return plan_fidelity(manifest, **{**settings, **changes})


PROVENANCE = {
    "cache": {"path": "cache.zarr", "identity_sha256": "this", "rows": 1000},
    "held_out_rows": {"first": 900, "count": 100},
    "objective": {
        "mha": {"pairs": [[2, 3]], "relation_heads": 8},
        "hs": {"mapping": "last1", "pairs": [[2, 4]]},
    },
}


def test_students_are_measured_where_they_were_trained() -> None:
    found = plan(make_manifest(attention=(2, 3)), provenance=PROVENANCE)
    assert found.rows == (range(900, 1000),) and found.held_out
    assert found.relations == (RelationPair(student_layer=2, teacher_layer=3, heads=8, view="plain"),)
    assert found.hidden == (HiddenPair(student_layer=2, teacher_layer=4, view="plain"),)
    assert found.logits_view == "masked"
    assert found.notes == ()
    assert plan(make_manifest(), provenance=PROVENANCE, rows=10).rows == (range(990, 1000),)


def test_students_that_weighed_all_layers_are_compared_as_by_default() -> None:
    hs = {"mapping": "emd", "student_layers": [1, 2], "teacher_layers": [1, 2, 3, 4]}
    found = plan(make_manifest(), provenance={**PROVENANCE, "objective": {"hs": hs}})
    assert [(pair.student_layer, pair.teacher_layer) for pair in found.hidden] == [(1, 2), (1, 3), (2, 4)]
    assert found.held_out and found.rows == (range(900, 1000),)
    assert any("trained with mapping 'emd'" in note and "uniform+last" in note for note in found.notes)


def test_students_from_elsewhere_get_the_defaults() -> None:
    found = plan(make_manifest(attention=(2, 3)))
    assert found.rows == (range(980, 1000),) and not found.held_out
    # common divisors of 32 and 24 up to 32 / 16
    assert [(pair.student_layer, pair.teacher_layer, pair.heads) for pair in found.relations] == [(2, 2, 2), (2, 3, 2)]
    assert [(pair.student_layer, pair.teacher_layer) for pair in found.hidden] == [(1, 2), (1, 3), (2, 4)]


def test_layers_that_the_cache_lacks_are_left_out() -> None:
    found = plan(make_manifest(hidden=(2,), attention=(1,)), provenance=PROVENANCE)
    assert [(pair.student_layer, pair.teacher_layer) for pair in found.hidden] == [(2, 2)]
    assert [pair.teacher_layer for pair in found.relations] == [1]
    assert len(found.notes) == 2


def test_what_cannot_be_measured_is_said() -> None:
    found = plan(make_manifest(hidden=(), attention=(), logits=False))
    assert (found.relations, found.hidden, found.logits_view) == ((), (), None)
    assert len(found.notes) == 3
    assert plan(make_manifest(), has_head=False).logits_view is None


def test_stored_matrices_are_measured_in_their_heads() -> None:
    def with_heads(heads: int) -> FidelityPlan:
        manifest = make_manifest(attention=())
        matrix = AttentionSpec(layer=3, form="matrix", codec="float16", heads=heads)
        return plan(replace(manifest, targets=replace(manifest.targets, attention=(matrix,))), provenance=PROVENANCE)

    assert [pair.heads for pair in with_heads(8).relations] == [8]
    other = with_heads(4)
    assert [pair.heads for pair in other.relations] == [4]
    assert "in the 4 heads that the cache holds, not in 8" in other.notes[-1]
    none = with_heads(16)
    assert none.relations == ()
    assert "16 relation heads, which do not divide the student's width 24" in none.notes[-1]


def test_another_cache_is_pointed_out() -> None:
    found = plan(make_manifest(rows=500), provenance=PROVENANCE, stores=[("other", 500)])
    assert found.rows == (range(490, 500),) and not found.held_out
    assert "other contents" in found.notes[0]


def test_of_several_stores_those_rows_are_measured_that_each_held_out() -> None:
    stores = [{"identity_sha256": name, "held_out": held_out} for name, held_out in (("a", 6), ("b", 4), ("c", 0))]
    cache = {"path": "a, b, c", "identity_sha256": "abc", "rows": 1000, "stores": stores}
    trained = {**PROVENANCE, "cache": cache, "held_out_rows": {"first": 594, "count": 10}}
    sizes = {"a": 600, "b": 399, "c": 1, "d": 1}

    def measured(names: str, **changes: Any) -> FidelityPlan:
        return plan(
            make_manifest(rows=sum(sizes[name] for name in names)),
            stores=[(name, sizes[name]) for name in names],
            **{"provenance": trained, **changes},
        )

    whole = measured("abc")
    assert whole.rows == (range(594, 600), range(995, 999))
    assert whole.held_out
    assert whole.notes == ()
    assert measured("abc", rows=5).rows == (range(597, 600), range(997, 999))
    # other orders and single stores are known too
    assert measured("ba").rows == (range(395, 399), range(993, 999)) and measured("ba").held_out
    assert measured("b").rows == (range(395, 399),) and measured("b").held_out
    seen = measured("c")
    assert seen.rows == (range(1),) and not seen.held_out and "held out no row of this store" in seen.notes[0]
    # a store that was built again in the place of another: the one number says how many
    again = measured("abd")
    assert again.rows == (range(594, 600), range(996, 999), range(999, 1000))
    assert not again.held_out and "other contents" in again.notes[0]
    assert "no record of kdtrain" in measured("abc", provenance={**trained, "cache": {**cache, "stores": [3]}}).notes[0]


def test_deeper_students_are_compared_at_the_last_layer() -> None:
    assert [(pair.student_layer, pair.teacher_layer) for pair in plan(make_manifest(), student_layers=6).hidden] == [
        (6, 4)
    ]
