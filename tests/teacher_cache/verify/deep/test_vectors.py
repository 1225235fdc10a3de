"""Stored vectors and relations beside those of the teacher: within what the codec declares, or found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.codecs.fixed import make_codec
from teacher_cache.contract.batch import AttentionRelations, AttentionVectors, TargetBatch
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VECTORS, vector_streams
from teacher_cache.contract.targets import FIXED_PRECISIONS, AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.format.attention_constants import projection_path
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.models.attention import AttentionProjections, Projection, project_hidden, relation_matrices
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.verify.deep.rows import DeepRow, RowComparison
from teacher_cache.verify.deep.vectors import CarriedComparison, RelationComparison, StreamComparison

Plain = Callable[..., Manifest]
LENGTH, WIDTH = 20, 32


def draw(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_row(live: TeacherOutputs, **targets: Any) -> DeepRow:
    """One row of 24 positions, the last four being padding, which alone gives what it gives among others."""
    ids_BT = torch.zeros(1, 24, dtype=torch.long)
    batch = TargetBatch(input_ids_BT=ids_BT, length_B=torch.tensor([LENGTH]), row_id_B=torch.tensor([0]), **targets)
    return DeepRow(targets=batch, masked_view=0, plain_ids_BT=ids_BT, live=live, alone=live)


def rounded(values_BTD: torch.Tensor, precision: str) -> torch.Tensor:
    """What a fixed precision makes of vectors; whatever at padding."""
    codec = make_codec(precision)
    coded = {name: torch.from_numpy(np.array(one)) for name, one in codec.encode(values_BTD[0]).items()}
    have_BTD = codec.decode(coded)[None].clone()
    have_BTD[:, LENGTH:] = float("nan")
    return have_BTD


def problem(comparison: RowComparison, *rows: DeepRow) -> str:
    for row in rows:
        comparison.add(row)
    (check,) = comparison.results()
    return check.problem


@pytest.mark.parametrize("precision", FIXED_PRECISIONS)
def test_rounded_values_pass_and_one_that_is_further_off_does_not(plain_manifest: Plain, precision: str) -> None:
    manifest = plain_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec=precision),)))
    (stream,) = vector_streams(manifest)
    live_BTD = draw(1, 1, 24, WIDTH)
    live = TeacherOutputs(hidden={2: live_BTD}, attention={}, final_BTD=live_BTD)
    have_BTD = rounded(live_BTD, precision)
    assert not problem(StreamComparison(manifest, stream), make_row(live, hidden={2: have_BTD}))
    bound = float(make_codec(precision).error_bound_ND(live_BTD[0])[5, 7])
    have_BTD[0, 5, 7] = live_BTD[0, 5, 7] + 2.5 * bound
    wrong = problem(StreamComparison(manifest, stream), make_row(live, hidden={2: have_BTD}))
    assert wrong == "1 values are beyond the codec's bound"


def test_a_calibrated_stream_is_held_to_its_declared_error(plain_manifest: Plain) -> None:
    record = TransformRecord(step=1.0, nmse=0.01, components={"byte": WIDTH})
    targets = TargetSpecs(hidden=(HiddenSpec(layer=2, codec="nmse:0.01"),))
    manifest = plain_manifest(targets, calibration={"hidden/2": record})
    (stream,) = vector_streams(manifest)
    for share, wrong in ((0.01, False), (0.05, True)):
        rows = []
        for seed in range(20):
            live_BTD = draw(seed, 1, 24, WIDTH)
            live = TeacherOutputs(hidden={2: live_BTD}, attention={}, final_BTD=live_BTD)
            rows.append(make_row(live, hidden={2: live_BTD + share**0.5 * draw(100 + seed, 1, 24, WIDTH)}))
        assert bool(problem(StreamComparison(manifest, stream), *rows)) == wrong


@pytest.mark.parametrize("wrong", [None, *VECTORS])
def test_each_of_queries_keys_and_values_is_compared(plain_manifest: Plain, wrong: str | None) -> None:
    manifest = plain_manifest(TargetSpecs(attention=(AttentionSpec(layer=3, form="vectors", codec="int8"),)))
    vectors = {f"{name}_BTD": draw(number, 1, 24, WIDTH) for number, name in enumerate(VECTORS)}
    live = TeacherOutputs(hidden={}, attention={3: AttentionVectors(**vectors)}, final_BTD=vectors["key_BTD"])
    have = {name: rounded(values, "int8") for name, values in vectors.items()}
    if wrong is not None:
        have[f"{wrong}_BTD"] = have[f"{wrong}_BTD"].roll(1, dims=1)
    row = make_row(live, attention={3: AttentionVectors(**have)})
    found = {s.source: problem(StreamComparison(manifest, s), row) for s in vector_streams(manifest)}
    assert {name for name, text in found.items() if text} == ({wrong} if wrong else set())


def test_relations_in_half_precision_pass_and_those_of_another_head_do_not(plain_manifest: Plain) -> None:
    spec = AttentionSpec(layer=3, form="matrix", codec="float16", heads=4)
    manifest = plain_manifest(TargetSpecs(attention=(spec,)))
    vectors = {f"{name}_BTD": draw(number, 1, 24, WIDTH) for number, name in enumerate(VECTORS)}
    live = TeacherOutputs(hidden={}, attention={3: AttentionVectors(**vectors)}, final_BTD=vectors["key_BTD"])
    real_BT = (torch.arange(24) < LENGTH)[None]
    have = {f"{name}_BATT": relation_matrices(vectors[f"{name}_BTD"], 4, real_BT).half() for name in VECTORS}
    row = make_row(live, attention={3: AttentionRelations(**have)})
    for stream in vector_streams(manifest):
        assert not problem(RelationComparison(manifest, stream), row)
    other = make_row(live, attention={3: AttentionRelations(**{k: v.roll(1, dims=1) for k, v in have.items()})})
    for stream in vector_streams(manifest):
        assert "beyond the declared error" in problem(RelationComparison(manifest, stream), other)


@pytest.fixture
def carried(plain_manifest: Plain, tmp_path: Path) -> tuple[Any, AttentionSpec, AttentionProjections]:
    """What a comparison asks of a reader of attention that is computed from hidden state 2 in int8."""
    spec = AttentionSpec(layer=3, form="input", codec="int8")
    manifest, storage = plain_manifest(TargetSpecs(attention=(spec,))), LocalStorage(tmp_path)
    maps = {
        name: Projection(weight=draw(number, WIDTH, WIDTH) / WIDTH**0.5, bias=draw(9 + number, WIDTH))
        for number, name in enumerate(VECTORS)
    }
    for name, one in maps.items():
        for part in ("weight", "bias"):
            write_constant(storage, projection_path(3, name, part), getattr(one, part).numpy())
    return SimpleNamespace(manifest=manifest, storage=storage), spec, AttentionProjections(**maps)


def test_attention_may_be_off_by_what_its_input_has_lost(
    carried: tuple[Any, AttentionSpec, AttentionProjections],
) -> None:
    """And by nothing else: with the projections of other vectors, or the input of other tokens, it is found."""
    reader, spec, projections = carried
    (stream,) = vector_streams(reader.manifest)
    input_BTD = draw(5, 1, 24, WIDTH)
    exact = project_hidden(input_BTD, projections)
    live = TeacherOutputs(hidden={2: input_BTD}, attention={3: exact}, final_BTD=input_BTD)
    have = project_hidden(rounded(input_BTD, "int8"), projections)
    assert not problem(CarriedComparison(reader, spec.layer, stream), make_row(live, attention={3: have}))
    swapped = AttentionVectors(query_BTD=have.key_BTD, key_BTD=have.query_BTD, value_BTD=have.value_BTD)
    moved = project_hidden(rounded(input_BTD.roll(1, dims=1), "int8"), projections)
    for wrong in (swapped, moved):
        assert problem(CarriedComparison(reader, spec.layer, stream), make_row(live, attention={3: wrong}))
