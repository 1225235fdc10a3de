"""Methods that learn attention relations: several pairs of layers, views, stored matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from student_train.methods.base import StudentNeeds
from student_train.methods.mha import AttentionTransfer
from student_train.methods.model import DistillationModel
from student_train.methods.objective import Objective, make_objective
from student_train.students.shape import derive_config, parse_shape
from student_train.students.student import build_student
from teacher_cache.contract.targets import AttentionSpec, TargetSpecs
from teacher_cache.errors import SettingsError


def student_config(cache: Any, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(cache.folder), parse_shape(shape), (2, 4))


def objective_of(cache: Any, method: str, layers: str | None = None, **options: Any) -> Objective:
    return make_objective({method: 1.0}, source=cache, student=student_config(cache), attention_layer=layers, **options)


@pytest.mark.parametrize("method", ["mha", "direct"])
def test_several_pairs_add_up(method: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(1, 2, 3, 4))
    batch = cache.batch([12, 5, 9])
    built = build_student("2x32:4", teacher_folder=cache.folder, init="random", with_mlm_head=False, seed=0, seq_len=12)

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


def matrices(cache: Any, **heads: int) -> Any:
    specs = tuple(
        AttentionSpec(layer=int(name[1:]), form="matrix", codec="float16", heads=count) for name, count in heads.items()
    )
    return replace(cache, manifest=replace(cache.manifest, targets=TargetSpecs(attention=specs)))


def test_matrices_of_different_heads_are_not_one_method(tiny_teacher: Any, live_cache: Any) -> None:
    cache = matrices(live_cache(tiny_teacher(), attention=(2, 3)), l2=4, l3=8)
    with pytest.raises(SettingsError, match=r"\(4 at layer 2, 8 at layer 3\)"):
        objective_of(cache, "mha", "1:2,2:3")
    method = objective_of(cache, "mha", "1:2").methods["mha"]
    assert isinstance(method, AttentionTransfer) and method.relation_heads == 4
