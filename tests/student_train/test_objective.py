"""The objective: what it asks of the cache and the student, how it is described, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from student_train.methods import AttentionTransfer, HiddenTransfer, StudentNeeds
from student_train.objective import FloatLinear, make_objective
from student_train.shape import derive_config, parse_shape
from teacher_cache.batch import TargetRequest
from teacher_cache.errors import SettingsError, TargetsError
from teacher_cache.specs import AttentionSpec, TargetSpecs


def student_config(folder: Any, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(folder), parse_shape(shape), (2, 4))


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
        "mha": {"student_layer": 2, "teacher_layer": 3, "relation_heads": 2, "weights": [1, 2, 3], "view": "plain"},
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
    ("cached", "asked", "expected"), [((3,), None, 3), ((1, 2, 3), None, 3), ((1, 2), None, 2), ((1, 3), 1, 1)]
)
def test_the_attention_layer(
    cached: tuple[int, ...], asked: int | None, expected: int, tiny_teacher: Any, live_cache: Any
) -> None:
    cache = live_cache(tiny_teacher(), attention=cached)
    objective = make_objective(
        {"mha": 1.0}, source=cache, student=student_config(tiny_teacher()), attention_layer=asked
    )
    method = objective.methods["mha"]
    assert isinstance(method, AttentionTransfer) and method.teacher_layer == expected
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


def test_projections_start_at_identity_or_small_and_seeded(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(2, 4))

    def projections(shape: str, seed: int = 0) -> dict[str, FloatLinear]:
        student = student_config(tiny_teacher(), shape)
        objective = make_objective({"hs": 1.0}, source=cache, student=student, mapping="uniform", seed=seed)
        assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
        return dict(objective.projections.items())  # type: ignore[arg-type]

    same = projections("2x32:4")
    assert list(same) == ["student_1_teacher_2", "student_2_teacher_4"]
    x_PD = torch.randn(3, 32)
    assert all(torch.equal(projection(x_PD), x_PD) for projection in same.values())
    first, again, other = projections("2x24:4", 1), projections("2x24:4", 1), projections("2x24:4", 2)
    name = "student_1_teacher_2"
    assert first[name].weight.shape == (32, 24) and 0.01 < first[name].weight.std().item() < 0.03
    assert torch.equal(first[name].weight, again[name].weight)
    assert not torch.equal(first[name].weight, other[name].weight)
    assert not torch.equal(first[name].weight, first["student_2_teacher_4"].weight)


def test_projections_compute_in_float32_when_kept_in_half_precision() -> None:
    projection = FloatLinear(8, 4).bfloat16()
    x_PD = torch.randn(3, 8).bfloat16()
    expected = x_PD.double() @ projection.weight.double().T + projection.bias.double()
    torch.testing.assert_close(projection(x_PD).double(), expected, rtol=1e-5, atol=1e-6)


def test_hidden_variance_is_read_for_the_mapped_layers_only(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(1, 2, 3, 4))
    objective = make_objective({"hs": 1.0}, source=cache, student=student_config(tiny_teacher()), mapping="1:1,2:3")
    method = objective.methods["hs"]
    assert isinstance(method, HiddenTransfer) and method.variance == {1: 3.0, 3: 5.0}
    assert objective.request == TargetRequest(hidden_layers=(1, 3))


def test_everything_that_lacks_is_asked_for_at_once(tiny_teacher: Any, live_cache: Any) -> None:
    """Before anything else is looked at, such as heads: another store is the first thing to get."""
    cache = live_cache(tiny_teacher(), hidden=(2,))
    with pytest.raises(TargetsError, match=r"hidden \{3, 4\}, attention \{3\}, logits True"):
        make_objective(
            {"mha": 1.0, "hs": 1.0, "od": 1.0}, source=cache, student=student_config(tiny_teacher()), relation_heads=5
        )
    assert len(cache.required) == 1


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_the_teacher_does_not_have(layer: int, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    with pytest.raises(SettingsError, match=f"--attention-layer {layer}: the teacher has layers 1 to 4"):
        make_objective({"mha": 1.0}, source=cache, student=student_config(tiny_teacher()), attention_layer=layer)
