"""Methods that learn attention: several pairs of layers, views, stored matrices, maps for vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from student_train.methods.base import StudentNeeds
from student_train.methods.direct import VectorTransfer, measure_spreads
from student_train.methods.mha import AttentionTransfer
from student_train.methods.model import DistillationModel
from student_train.methods.objective import Objective, make_objective
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from student_train.students.student import build_student, plan_student
from teacher_cache.contract.targets import AttentionSpec, TargetSpecs
from teacher_cache.errors import SettingsError, TargetsError


def student_config(cache: Any, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(cache.folder), read_shape(shape).completed(), (2, 4))


def objective_of(cache: Any, method: str, layers: str | None = None, **options: Any) -> Objective:
    return make_objective({method: 1.0}, source=cache, student=student_config(cache), attention_layer=layers, **options)


@pytest.mark.parametrize("method", ["mha", "direct"])
def test_several_pairs_add_up(method: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(1, 2, 3, 4))
    batch = cache.batch([12, 5, 9])
    built = build_student(
        plan_student("2x32:4", teacher_folder=cache.folder, init="random", with_mlm_head=False, seq_len=12), seed=0
    )

    def loss(layers: str) -> tuple[float, int]:
        objective = make_objective(
            {method: 1.0}, source=cache, student=built.model.config, attention_layer=layers, relation_heads=4
        )
        found = DistillationModel(built.model, objective)(batch)[method]
        return found.total.item(), int(found.count)

    parts = [loss("1:2")[0], loss("2:2")[0], loss("2:4")[0]]
    total, count = loss("2:4, 1:2,2:2")
    # positions are counted once, whatever the number of pairs
    assert total == pytest.approx(sum(parts), rel=1e-5) and count == 26
    assert loss("4") == loss("2:4")


def test_pairs_of_different_views(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(2, 4))
    first, second = cache.manifest.targets.attention
    targets = TargetSpecs(attention=(first, replace(second, view="masked")))
    cache = replace(cache, manifest=replace(cache.manifest, targets=targets))
    for method in ("mha", "direct"):
        objective = objective_of(cache, method, "1:2,2:4")
        assert objective.needs("plain") == StudentNeeds(attention_layers=frozenset({1}))
        assert objective.needs("masked") == StudentNeeds(attention_layers=frozenset({2}))
        assert objective.describe()[method]["view"] == "masked+plain"


def test_maps_of_vectors_start_at_identity_or_small_and_seeded(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    names = [f"student_2_teacher_3_{name}" for name in ("query", "key", "value")]
    same = make_objective({"direct": 1.0}, source=cache, student=student_config(cache, "2x32:4"))
    assert list(same.projections["direct"]) == names
    assert all(torch.equal(each.weight, torch.eye(32)) for each in same.projections["direct"].values())
    first, again, other = (objective_of(cache, "direct", seed=seed).projections["direct"] for seed in (1, 1, 2))
    assert all(torch.equal(first[name].weight, again[name].weight) for name in names)
    assert all(first[name].weight.shape == (32, 24) for name in names)
    assert not torch.equal(first[names[0]].weight, other[names[0]].weight)
    assert not torch.equal(first[names[0]].weight, first[names[1]].weight)
    # what weighs nothing gets no map: it would have no gradient
    assert list(objective_of(cache, "direct", relation_weights=(0, 1, 0)).projections["direct"]) == names[1:2]


def test_vectors_shared_among_heads_are_narrower(tiny_teacher: Any, live_cache: Any) -> None:
    """Grouped queries: 4 heads of queries, 2 of keys and values."""
    cache = live_cache(tiny_teacher(), attention=(3,))
    config = student_config(cache)
    config.num_key_value_heads = 2
    maps = make_objective({"direct": 1.0}, source=cache, student=config).projections["direct"]
    assert [each.weight.shape[1] for each in maps.values()] == [24, 12, 12]


def test_spreads_are_those_of_real_positions(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    spread = measure_spreads(cache, (3,))[3]
    batch = cache.read_rows(0, cache.manifest.rows, None)["plain"]
    keys = torch.cat([batch.attention[3].key_BTD[row, :length] for row, length in enumerate(batch.length_B.tolist())])
    assert spread.widths == (32, 32, 32)
    assert spread.variances[1] == pytest.approx(float(keys.double().var(0, correction=0).sum()), rel=1e-6)


def matrices(cache: Any, **heads: int) -> Any:
    specs = tuple(
        AttentionSpec(layer=int(name[1:]), form="matrix", codec="float16", heads=count) for name, count in heads.items()
    )
    return replace(cache, manifest=replace(cache.manifest, targets=TargetSpecs(attention=specs)))


def test_matrices_are_no_vectors(tiny_teacher: Any, live_cache: Any) -> None:
    cache = matrices(live_cache(tiny_teacher(), attention=(3,)), l3=4)
    with pytest.raises(TargetsError, match="attention 3 as matrices .*--method mha.*--relations hidden or qkv"):
        objective_of(cache, "direct")


def test_matrices_of_different_heads_are_not_one_method(tiny_teacher: Any, live_cache: Any) -> None:
    cache = matrices(live_cache(tiny_teacher(), attention=(2, 3)), l2=4, l3=8)
    with pytest.raises(SettingsError, match=r"\(4 at layer 2, 8 at layer 3\)"):
        objective_of(cache, "mha", "1:2,2:3")
    method = objective_of(cache, "mha", "1:2").methods["mha"]
    assert isinstance(method, AttentionTransfer) and method.relation_heads == 4


def test_what_a_record_says(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    method = objective_of(cache, "direct", "1:3,2:3").methods["direct"]
    assert isinstance(method, VectorTransfer)
    assert method.describe() == {"pairs": [[1, 3], [2, 3]], "weights": [1.0, 1.0, 1.0], "view": "plain"}
