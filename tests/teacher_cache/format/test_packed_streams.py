"""Codes of two views in the arrays of a block, read back number by number as the specification says they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.targets import HiddenSpec, TargetSpecs
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.packed_streams import StreamPacker

COMPONENTS = {"wide": 0, "byte": 8, "pair": 8, "triple": 8, "five": 0, "zero": 8}
RADIX = {"pair": (2, 7), "triple": (3, 2)}
"""Values a byte, and the largest magnitude of each: digits to the base 2 * limit + 1, the first the highest."""


@pytest.fixture
def layout(small_manifest: Callable[..., Manifest]) -> StoreLayout:
    targets = TargetSpecs(hidden=(HiddenSpec(layer=2, codec="nmse:0.01", view="masked"),))
    record = TransformRecord(step=0.5, nmse=0.01, components=COMPONENTS)
    return StoreLayout.of(small_manifest(targets, calibration={"hidden/2": record}))


def packed(
    layout: StoreLayout, codes_DN: NDArray[Any], cuts: Iterable[int], draw: np.random.Generator | None = None
) -> dict[str, NDArray[np.generic]]:
    """The arrays of codes of two views, put in ranges that end at these tokens, in a random order if one is drawn."""
    packer = StreamPacker(layout, layout.stream("hidden/2"))
    views = np.split(codes_DN, 2, axis=1)
    ends = [0, *sorted(cuts), views[0].shape[1]]
    ranges = [(view, start, stop) for view in range(2) for start, stop in pairwise(ends)]
    for view, start, stop in ranges if draw is None else draw.permutation(ranges).tolist():
        packer.put(view, start, torch.from_numpy(views[view][:, start:stop].copy()))
    return packer.finish()


def unpack(layout: StoreLayout, arrays: dict[str, NDArray[np.generic]]) -> NDArray[np.int64]:
    """The codes [D, W, N] in plain arithmetic, one number at a time."""
    codes_DWN = np.zeros((32, 2, 8), dtype=np.int64)
    first = 0
    for name in ("byte", "pair", "triple"):
        packed = arrays[f"hidden/2/codes/{name}"]
        for component, view, token in np.ndindex(8, 2, 8):
            per_byte, limit = RADIX.get(name, (1, 0))
            length = -(-8 // per_byte)
            number = int(packed[component, view * length + token // per_byte])
            if per_byte > 1:
                number = number // (2 * limit + 1) ** (per_byte - 1 - token % per_byte) % (2 * limit + 1) - limit
            codes_DWN[first + component, view, token] = number
        first += 8
    count_W, index_WE, value_WE = (arrays[f"hidden/2/escapes/{name}"] for name in ("count", "index", "value"))
    for view in range(2):
        for entry in range(int(count_W[view])):
            component, token = divmod(int(index_WE[view, entry]), 8)
            codes_DWN[component, view, token] = int(value_WE[view, entry])
    return codes_DWN


def test_packed_components_and_what_exceeds_their_packing_are_the_codes(layout: StoreLayout) -> None:
    draw = np.random.default_rng(0)
    limits_D = np.repeat([127, 7, 2, 0], 8)
    codes_DN = draw.integers(-limits_D[:, None], limits_D[:, None] + 1, size=(32, 16)).astype(np.int16)
    # beyond their packings: in the first view three, in the second one
    codes_DN[0, 1], codes_DN[9, 7], codes_DN[31, 0], codes_DN[20, 12] = 300, -8, 1, -30000
    arrays = packed(layout, codes_DN, [4])
    assert {path: (str(one.dtype), one.shape) for path, one in arrays.items()} == {
        path: (layout.arrays[path].dtype, layout.arrays[path].block_shape) for path in layout.arrays_in("hidden/2")
    }
    assert arrays["hidden/2/escapes/count"].tolist() == [3, 1]
    assert np.array_equal(unpack(layout, arrays), codes_DN.reshape(32, 2, 8))


def test_more_escapes_than_there_is_room_for_are_refused_with_their_number(layout: StoreLayout) -> None:
    manifest = replace(layout.manifest, block_rows=512, rows=512)
    larger = StoreLayout.of(manifest)
    codes_DN = np.full((32, 2 * 512 * 4), 200, dtype=np.int16)
    with pytest.raises(TeacherError, match="hidden/2 has 65536 values in one block .*room is for 16384"):
        packed(larger, codes_DN, [])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), cuts=st.sets(st.integers(1, 29), max_size=6), kind=st.sampled_from([float, int]))
def test_ranges_put_in_any_order_are_the_block_put_at_once(
    small_manifest: Callable[..., Manifest], seed: int, cuts: set[int], kind: type
) -> None:
    """Ten rows of three tokens: nearly every cut lies within a byte of some packing."""
    draw = np.random.default_rng(seed)
    targets = TargetSpecs(hidden=(HiddenSpec(layer=2, codec="nmse:0.01", view="masked"),))
    components = {"wide": 1, "byte": 3, "pair": 8, "triple": 7, "five": 6, "zero": 7}
    record = TransformRecord(step=0.5, nmse=0.01, components=components)
    manifest = small_manifest(targets, calibration={"hidden/2": record})
    layout = StoreLayout.of(replace(manifest, seq_len=3, block_rows=10, rows=10))
    limits_D = np.repeat([1000, 127, 7, 2, 1, 0], list(components.values()))
    codes_DN = draw.integers(-limits_D[:, None], limits_D[:, None] + 1, size=(32, 60)).astype(np.int16)
    codes_DN[draw.integers(32, size=5), draw.integers(60, size=5)] = -30000
    whole = packed(layout, codes_DN, [])
    moved_DN = codes_DN + draw.uniform(-0.49, 0.49, codes_DN.shape) if kind is float else codes_DN
    parts = packed(layout, moved_DN.astype(np.float32 if kind is float else np.int16), cuts, draw)
    assert whole.keys() == parts.keys()
    for path, values in whole.items():
        assert np.array_equal(values, parts[path]), path


def test_what_is_not_put_is_coded_as_zeros(layout: StoreLayout) -> None:
    nothing = StreamPacker(layout, layout.stream("hidden/2")).finish()
    for path, values in packed(layout, np.zeros((32, 16), dtype=np.int16), []).items():
        assert np.array_equal(values, nothing[path]), path
