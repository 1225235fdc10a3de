"""Rotations, steps and projections of a store: what is kept is what is read, and codes by the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teacher_cache.codecs.nmse import Transform
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.errors import StoreError
from teacher_cache.format.attention_constants import projection_path
from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import read_manifest
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.format.transforms import (
    keep_calibration,
    load_quantisers,
    read_projections,
    read_transform,
    stream_projections,
)
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention import AttentionProjections, Projection
from teacher_cache.storage.local import LocalStorage

TARGETS = TargetSpecs(
    hidden=(HiddenSpec(layer=2, codec="nmse:0.01"), HiddenSpec(layer=4, codec="int8")),
    attention=(AttentionSpec(layer=2, form="projected", codec="nmse:0.1"),),
)
RECORD = TransformRecord(
    step=0.25, nmse=0.01, components={"wide": 0, "byte": 8, "pair": 24, "triple": 0, "five": 0, "zero": 0}
)
PROJECTED_RECORD = replace(RECORD, step=0.5)
HIDDEN, PROJECTED = "hidden/2", "attention/2/projected"


def transform(width: int, step: float) -> Transform:
    draw = torch.Generator().manual_seed(width)
    basis_DK = torch.linalg.qr(torch.randn(width, 32, generator=draw, dtype=torch.float64)).Q.float()
    return Transform(basis_DK=basis_DK, mean_D=torch.randn(width, generator=draw), step=step)


def projections() -> AttentionProjections:
    draw = torch.Generator().manual_seed(1)
    maps = {
        name: Projection(weight=torch.randn(32, 32, generator=draw), bias=torch.randn(32, generator=draw))
        for name in VECTORS
    }
    return AttentionProjections(**maps)


@pytest.fixture
def writer(small_manifest: Callable[..., Manifest], tmp_path: Path) -> GroupWriter:
    return GroupWriter(LocalStorage(tmp_path / "store"), Group(prefix="", manifest=small_manifest(TARGETS), seal=None))


@pytest.fixture
def calibrated(writer: GroupWriter) -> GroupWriter:
    return keep_calibration(
        writer, {HIDDEN: (transform(32, 0.25), RECORD), PROJECTED: (transform(96, 0.5), PROJECTED_RECORD)}
    )


def test_what_calibration_found_is_read_bit_for_bit(calibrated: GroupWriter) -> None:
    for path, want in ((HIDDEN, transform(32, 0.25)), (PROJECTED, transform(96, 0.5))):
        have = read_transform(calibrated.storage, calibrated.group.layout.stream(path))
        assert torch.equal(have.basis_DK, want.basis_DK) and torch.equal(have.mean_D, want.mean_D)
        assert have.step == want.step
    assert calibrated.manifest.calibration == {HIDDEN: RECORD, PROJECTED: PROJECTED_RECORD}
    assert read_manifest(calibrated.storage) == calibrated.manifest
    assert not calibrated.group.layout.uncalibrated


def test_quantisers_are_of_calibrated_streams_and_code_as_the_formula_says(calibrated: GroupWriter) -> None:
    maps = projections()
    quantisers = load_quantisers(calibrated.storage, calibrated.group.layout, {2: maps})
    assert quantisers.keys() == {HIDDEN, PROJECTED}, "not of the stream in a fixed precision"
    values_NH = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    x_ND = torch.cat(
        [values_NH.double() @ one.weight.double().T + one.bias.double() for one in (maps.query, maps.key, maps.value)],
        1,
    )
    for path, coded_ND in ((HIDDEN, values_NH.double()), (PROJECTED, x_ND)):
        one = read_transform(calibrated.storage, calibrated.group.layout.stream(path))
        exact_NK = (coded_ND - one.mean_D.double()) @ one.basis_DK.double() / one.step
        have_NK = quantisers[path].quantise(values_NH).T.double()
        # numbers half-way between two codes may go either way in float32
        assert float((have_NK - exact_NK).abs().max()) < 0.5 + 1e-4
        assert float(exact_NK.abs().max()) > 3, "there is something to code"


def test_only_a_projected_stream_is_coded_in_the_metric_of_what_follows(calibrated: GroupWriter) -> None:
    layout, maps = calibrated.group.layout, {2: projections()}
    assert stream_projections(layout.stream(PROJECTED), maps) is maps[2]
    assert stream_projections(layout.stream(HIDDEN), maps) is None


def test_projections_are_read_by_layer_and_name(writer: GroupWriter) -> None:
    want = projections()
    for name in VECTORS:
        for part in ("weight", "bias"):
            write_constant(writer.storage, projection_path(2, name, part), getattr(getattr(want, name), part).numpy())
    have = read_projections(writer.storage, writer.manifest, 2)
    for name in VECTORS:
        assert torch.equal(getattr(have, name).weight, getattr(want, name).weight)
        assert torch.equal(getattr(have, name).bias, getattr(want, name).bias)
    writer.storage.delete(f"{projection_path(2, 'query', 'weight')}/zarr.json")
    with pytest.raises(StoreError, match="'attention/2/projection/query/weight' cannot be read"):
        read_projections(writer.storage, writer.manifest, 2)


def test_a_lost_part_of_a_transform_is_named(calibrated: GroupWriter) -> None:
    calibrated.storage.delete(f"{HIDDEN}/mean/c/0")
    with pytest.raises(StoreError, match="'hidden/2/mean' cannot be read"):
        read_transform(calibrated.storage, calibrated.group.layout.stream(HIDDEN))
