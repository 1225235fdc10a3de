"""Vectors of attention learned through linear maps: the loss by hand, the maps, the variances, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from student_train.methods.base import StudentOutputs
from student_train.methods.direct import VARIANCE_ROWS, VectorTransfer, make_vector_transfer, measure_spreads
from student_train.methods.objective import Objective, make_objective
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.targets import AttentionSpec, TargetSpecs
from teacher_cache.errors import TargetsError

NAMES = ("query", "key", "value")


def student_config(cache: Any, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(cache.folder), read_shape(shape).completed(), (2, 4))


def objective_of(cache: Any, method: str, layers: str | None = None, **options: Any) -> Objective:
    return make_objective({method: 1.0}, source=cache, student=student_config(cache), attention_layer=layers, **options)


def student_outputs(rows: int, positions: int, layers: tuple[int, ...]) -> dict[Any, StudentOutputs]:
    """Random vectors of 24 components of a student nobody has made."""
    generator = torch.Generator().manual_seed(5)

    def draw() -> torch.Tensor:
        return torch.randn(rows, positions, 24, generator=generator)

    attention = {layer: AttentionVectors(query_BTD=draw(), key_BTD=draw(), value_BTD=draw()) for layer in layers}
    return {"plain": StudentOutputs(hidden={}, attention=attention, last_hidden_BTD=draw())}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.0, 2.0)])
def test_the_loss_is_the_squared_error_in_units_of_the_variance(
    weights: tuple[float, ...], tiny_teacher: Any, live_cache: Any
) -> None:
    """Against a plain sum over rows, positions, pairs and vectors in float64."""
    cache = live_cache(tiny_teacher(), attention=(2, 3))
    pairs, lengths = ((1, 2), (2, 2), (2, 3)), [12, 5, 9]
    method, maps = make_vector_transfer(cache, student_config(cache), pairs, weights, seed=0)
    batch, outputs = cache.batch(lengths), student_outputs(3, 12, (1, 2))
    expected = 0.0
    for student_layer, teacher_layer in pairs:
        for name, weight, variance in zip(NAMES, weights, method.variances[teacher_layer], strict=True):
            if weight == 0:
                continue
            linear = maps[f"student_{student_layer}_teacher_{teacher_layer}_{name}"].double()
            student = getattr(outputs["plain"].attention[student_layer], f"{name}_BTD").double()
            teacher = getattr(batch["plain"].attention[teacher_layer], f"{name}_BTD").double()
            for row, length in enumerate(lengths):
                for position in range(length):
                    error = linear.weight @ student[row, position] + linear.bias - teacher[row, position]
                    expected += weight / variance * float((error**2).sum().detach())
            linear.float()
    found = method.loss(outputs, batch, maps)
    assert found.total.item() == pytest.approx(expected, rel=1e-5) and int(found.count) == 26


def test_the_best_constant_guess_costs_the_sum_of_the_weights(tiny_teacher: Any, live_cache: Any) -> None:
    """Over the rows that the variance was measured on: maps to nothing but the mean."""
    cache = live_cache(tiny_teacher(), attention=(3,))
    method, maps = make_vector_transfer(cache, student_config(cache), ((2, 3),), (1.0, 2.0, 3.0), seed=0)
    batch = cache.read_rows(0, min(VARIANCE_ROWS, cache.manifest.rows), method.request)
    real_BT = batch["plain"].real_BT()
    for name in NAMES:
        linear = maps[f"student_2_teacher_3_{name}"]
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.copy_(getattr(batch["plain"].attention[3], f"{name}_BTD")[real_BT].mean(0))
    found = method.loss(student_outputs(*real_BT.shape, (2,)), batch, maps)
    assert found.total.item() / int(found.count) == pytest.approx(6.0, rel=1e-4)


def test_vectors_to_fit_are_those_of_real_positions(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    method, _ = make_vector_transfer(cache, student_config(cache), ((1, 3),), (1.0, 0.0, 1.0), seed=0)
    batch, outputs = cache.batch([12, 5]), student_outputs(2, 12, (1,))
    found = {name: (student, teacher) for name, student, teacher in method.mapped(outputs, batch)}
    assert list(found) == ["student_1_teacher_3_query", "student_1_teacher_3_value"]
    student_ND, teacher_ND = found["student_1_teacher_3_value"]
    assert torch.equal(student_ND[12:], outputs["plain"].attention[1].value_BTD[1, :5])
    assert torch.equal(teacher_ND[12:], batch["plain"].attention[3].value_BTD[1, :5])


def test_sinks_are_not_learned(tiny_teacher: Any, live_cache: Any) -> None:
    """Not in the loss, the variances or the fit, however large they are."""
    cache = live_cache(tiny_teacher(), attention=(2,))
    batch, outputs = cache.batch([12, 5, 9]), student_outputs(3, 12, (1,))
    first_BT = torch.zeros(3, 12, dtype=torch.bool)
    first_BT[:, 0] = True
    vectors = {f"{name}_BTD": getattr(batch["plain"].attention[2], f"{name}_BTD").clone() for name in NAMES}
    for one in vectors.values():
        one[:, 0] *= 1000
    large = {
        "plain": replace(batch["plain"], attention={2: AttentionVectors(**vectors)}, attention_sinks={2: first_BT})
    }
    small = {"plain": replace(batch["plain"], attention_sinks={2: first_BT})}
    method, maps = make_vector_transfer(cache, student_config(cache), ((1, 2),), (1.0, 1.0, 1.0), seed=0)
    sums = [method.loss(outputs, one, maps) for one in (large, small, batch)]
    assert torch.equal(sums[0].total, sums[1].total) and sums[1].total < sums[2].total
    assert [int(one.count) for one in sums] == [26] * 3
    assert all(len(student) == len(teacher) == 23 for _, student, teacher in method.mapped(outputs, large))

    class Given:
        manifest = cache.manifest

        def read_rows(self, *_: Any) -> Any:
            return large

    variances = measure_spreads(Given(), (2,))[2].variances  # type: ignore[arg-type]
    for name, found in zip(NAMES, variances, strict=True):
        values = vectors[f"{name}_BTD"][batch["plain"].real_BT() & ~first_BT].double()
        assert found == pytest.approx(float((values - values.mean(0)).square().sum(1).mean()), rel=1e-6)


def test_a_vector_that_never_changes_leaves_its_error_as_it_is(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    batch = cache.read_rows(0, 8, None)
    held = batch["plain"].attention[3]
    constant = replace(held, key_BTD=torch.ones_like(held.key_BTD))
    frozen = {"plain": replace(batch["plain"], attention={3: constant})}

    class Constant:
        manifest = cache.manifest

        def read_rows(self, *_: Any) -> Any:
            return frozen

    assert measure_spreads(Constant(), (3,))[3].variances[1] == 1.0


def matrices(cache: Any, **heads: int) -> Any:
    specs = tuple(
        AttentionSpec(layer=int(name[1:]), form="matrix", codec="float16", heads=count) for name, count in heads.items()
    )
    return replace(cache, manifest=replace(cache.manifest, targets=TargetSpecs(attention=specs)))


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


def test_matrices_are_no_vectors(tiny_teacher: Any, live_cache: Any) -> None:
    cache = matrices(live_cache(tiny_teacher(), attention=(3,)), l3=4)
    with pytest.raises(TargetsError, match="attention 3 as matrices .*--method mha.*--relations hidden or qkv"):
        objective_of(cache, "direct")


def test_what_a_record_says(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), attention=(3,))
    method = objective_of(cache, "direct", "1:3,2:3").methods["direct"]
    assert isinstance(method, VectorTransfer)
    assert method.describe() == {"pairs": [[1, 3], [2, 3]], "weights": [1.0, 1.0, 1.0], "view": "plain"}
