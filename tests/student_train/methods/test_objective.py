"""The objective: what it asks of the cache and the student, how it is described, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from student_train.methods.base import StudentNeeds
from student_train.methods.mha import AttentionTransfer
from student_train.methods.objective import make_objective
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.targets import AttentionSpec, TargetSpecs
from teacher_cache.errors import SettingsError, TargetsError


def student_config(folder: Any, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(folder), read_shape(shape).completed(), (2, 4))


def test_everything_at_once(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(2, 3, 4), attention=(3,), logits=True, temperature=2.0)
    objective = make_objective(
        {"mha": 1.0, "hs": 0.1, "od": 0.5},
        source=cache,
        student=student_config(tiny_teacher()),
        relation_weights=(1, 2, 3),
    )
    assert objective.weights == {"mha": 1.0, "hs": 0.1, "od": 0.5} and list(objective.methods) == ["mha", "hs", "od"]
    assert objective.request == TargetRequest(hidden_layers=(2, 3, 4), attention_layers=(3,), logits=True)
    assert objective.needs("plain") == StudentNeeds(hidden_layers=frozenset({1, 2}), attention_layers=frozenset({2}))
    assert objective.needs("masked") == StudentNeeds(head=True)
    assert objective.describe() == {
        "mha": {"relation_heads": 2, "pairs": [[2, 3]], "weights": [1, 2, 3], "view": "plain"},
        "hs": {"mapping": "uniform+last", "pairs": [[1, 2], [1, 3], [2, 4]]},
        "od": {"form": "topk", "loss": "tail", "temperature": 2.0, "view": "masked"},
    }


def test_methods_on_the_masked_view_need_nothing_of_the_plain_one(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(4,), attention=(3,), view="masked")
    objective = make_objective(
        {"mha": 1.0, "hs": 1.0}, source=cache, student=student_config(tiny_teacher()), mapping="last1"
    )
    assert not objective.needs("plain")
    assert objective.needs("masked") == StudentNeeds(hidden_layers=frozenset({2}), attention_layers=frozenset({2}))


@pytest.mark.parametrize(
    ("cached", "asked", "expected"), [((3,), None, 3), ((1, 2, 3), None, 3), ((1, 2), None, 2), ((1, 3), "1", 1)]
)
def test_the_attention_layer(
    cached: tuple[int, ...], asked: str | None, expected: int, tiny_teacher: Any, live_cache: Any
) -> None:
    cache = live_cache(tiny_teacher(), attention=cached)
    objective = make_objective(
        {"mha": 1.0}, source=cache, student=student_config(tiny_teacher()), attention_layer=asked
    )
    method = objective.methods["mha"]
    assert isinstance(method, AttentionTransfer) and method.pairs == ((2, expected),)
    assert cache.required == [TargetRequest(attention_layers=(expected,))]


def test_what_the_cache_lacks_is_refused_by_the_cache(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(2,))
    for methods in ({"mha": 1.0}, {"hs": 1.0}, {"od": 1.0}):
        with pytest.raises(TargetsError):
            make_objective(methods, source=cache, student=student_config(tiny_teacher()))
    # the default layer is what a store without attention is asked for
    assert cache.required[0] == TargetRequest(attention_layers=(3,))


@pytest.mark.parametrize(
    ("heads", "nearest"), [(3, "2 or 4"), (5, "4 or 8"), (0, "1"), (16, "8"), (-1, "1"), (999, "8")]
)
def test_relation_heads_name_the_nearest(heads: int, nearest: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    with pytest.raises(SettingsError, match=f"32 and the student's width 24: .*nearest that does is {nearest}$"):
        make_objective({"mha": 1.0}, source=cache, student=student_config(tiny_teacher()), relation_heads=heads)


def test_heads_of_stored_matrices_are_kept(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    matrix = AttentionSpec(layer=3, form="matrix", codec="float16", heads=4)
    cache = replace(cache, manifest=replace(cache.manifest, targets=TargetSpecs(attention=(matrix,))))

    def objective(shape: str, heads: int | None) -> Any:
        student = student_config(tiny_teacher(), shape)
        return make_objective({"mha": 1.0}, source=cache, student=student, relation_heads=heads).methods["mha"]

    assert objective("2x24:4", None).relation_heads == objective("2x24:4", 4).relation_heads == 4
    with pytest.raises(SettingsError, match="--relation-heads 8: .* matrices of 4 heads.*give --relation-heads 4"):
        objective("2x24:4", 8)
    with pytest.raises(SettingsError, match="4 heads, which do not divide the student's width 18"):
        objective("2x18:3", None)


def test_another_vocabulary_is_refused_for_the_distribution(tiny_teacher: Any, live_cache: Any) -> None:
    config = student_config(tiny_teacher())
    config.vocab_size = 210
    with pytest.raises(SettingsError, match="210 vocabulary entries, the teacher 200"):
        make_objective({"od": 1.0}, source=live_cache(tiny_teacher(), logits=True), student=config)


def test_everything_that_lacks_is_asked_for_at_once(tiny_teacher: Any, live_cache: Any) -> None:
    """Before anything else is looked at, such as heads: another store is the first thing to get."""
    cache = live_cache(tiny_teacher(), hidden=(2,))
    with pytest.raises(TargetsError, match=r"hidden \{3, 4\}, attention \{3\}, logits True"):
        make_objective(
            {"mha": 1.0, "hs": 1.0, "od": 1.0}, source=cache, student=student_config(tiny_teacher()), relation_heads=5
        )
    assert len(cache.required) == 1


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("0", "'0' names layer 0 of the teacher: layers are numbered from 1"),
        ("5", "'5' names layer 5 of the teacher, which has layers 1 to 4"),
        ("3:4", "'3:4' names layer 3 of the student, which has layers 1 to 2"),
        ("1,2", "'1,2' cannot be read at '1': .* pairs student:teacher such as 2:4"),
        ("last", "'last' cannot be read at 'last'"),
    ],
)
def test_attention_layers_that_cannot_be(asked: str, problem: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    with pytest.raises(SettingsError, match=f"--attention-layer {problem}"):
        make_objective({"mha": 1.0}, source=cache, student=student_config(tiny_teacher()), attention_layer=asked)
