"""Rows of a source, found in its blocks and read as they are coded, beside plain zarr and the documented layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from teacher_cache.codecs.packing import pack_codes
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VectorStream, vector_streams
from teacher_cache.contract.targets import HiddenSpec, TargetSpecs
from teacher_cache.derive.source_rows import SourcePiece, SourceRows, find_pieces
from teacher_cache.errors import StoreError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.read.load import BlockLoader
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay

RADIX = {"pair": (15, 2), "triple": (5, 3), "five": (3, 5)}


@given(block_rows=st.integers(1, 50), rows=st.integers(1, 200), data=st.data())
def test_pieces_cover_every_row_once_and_in_order(
    plain_manifest: Callable[..., Manifest], block_rows: int, rows: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    manifest = plain_manifest(TargetSpecs(), rows=rows, block_rows=block_rows)
    pieces = find_pieces(manifest, first, last)
    found = [piece.block * block_rows + row for piece in pieces for row in range(piece.start, piece.stop)]
    assert found == list(range(first, last))
    places = [row for piece in pieces for row in range(piece.target.start, piece.target.stop)]
    assert places == list(range(last - first))
    assert all(piece.start < piece.stop <= block_rows for piece in pieces)
    assert len({piece.block for piece in pieces}) == len(pieces)


def plain_codes(store: Path, stream: VectorStream, block: int, rows: int, positions: int) -> NDArray[np.int64]:
    """The codes [D, W, R * T] of one block, from zarr's arrays, one byte at a time."""
    assert stream.calibration is not None
    group = zarr.open_group(str(store / stream.path), mode="r")
    count_W = np.asarray(group["escapes/count"])[block]
    codes_DWN = np.zeros((stream.width, len(count_W), rows * positions), dtype=np.int64)
    component = 0
    for name, count in stream.calibration.components.items():
        if count and name != "zero":
            packed = np.asarray(group[f"codes/{name}"])[block].astype(np.int64)
            for row, view in np.ndindex(count, len(count_W)):
                part = np.split(packed[row], len(count_W))[view]
                if name in RADIX:
                    radix, per_byte = RADIX[name]
                    digits = [part // radix ** (per_byte - 1 - place) % radix - radix // 2 for place in range(per_byte)]
                    part = np.stack(digits, axis=1).ravel()
                codes_DWN[component + row, view] = part[: rows * positions]
        component += count
    index, value = (np.asarray(group[f"escapes/{name}"])[block] for name in ("index", "value"))
    for view, escapes in enumerate(count_W):
        for place, code in zip(index[view, :escapes], value[view, :escapes], strict=True):
            codes_DWN[int(place) // (rows * positions), view, int(place) % (rows * positions)] = code
    return codes_DWN


@pytest.mark.parametrize("start, stop", [(0, 16), (0, 1), (5, 11), (15, 16)])
def test_codes_are_those_of_the_documented_layout(nmse_store: Path, start: int, stop: int) -> None:
    """Escapes of the rows included, and of no others."""
    reader = CacheReader.open(nmse_store)
    rows, seen = SourceRows(reader), 0
    for stream in vector_streams(reader.manifest):
        piece = SourcePiece(block=1, start=start, stop=stop, to=0)
        want = plain_codes(nmse_store, stream, 1, 16, 24)[:, :, start * 24 : stop * 24]
        assert np.array_equal(torch.stack([*rows.codes(stream, piece)], dim=1).numpy(), want), stream.path
        seen += int(np.count_nonzero(want))
    assert seen


@pytest.mark.parametrize("start, stop", [(0, 16), (3, 9)])
def test_values_are_those_that_a_reader_decodes(small_store: Path, start: int, stop: int) -> None:
    reader = CacheReader.open(small_store)
    rows = SourceRows(reader)
    piece = SourcePiece(block=1, start=start, stop=stop, to=0)
    for stream in vector_streams(reader.manifest):
        (values_ND,) = rows.values(stream, piece)
        stored = np.asarray(zarr.open_array(str(small_store / stream.path / "codes"), mode="r"))[1]
        want = stored[:, start * 24 : stop * 24].T.astype(np.float32)
        assert np.array_equal(values_ND.numpy(), want)


def test_padding_is_what_lies_behind_the_length(small_store: Path) -> None:
    reader = CacheReader.open(small_store)
    piece = SourcePiece(block=2, start=2, stop=8, to=0)
    length_R = np.asarray(zarr.open_array(str(small_store / "length"), mode="r"))[2][2:8]
    want = [position >= length for length in length_R for position in range(24)]
    assert SourceRows(reader).padding(piece).tolist() == want


def test_damaged_codes_are_refused(nmse_store: Path) -> None:
    draft = Overlay(LocalStorage(nmse_store))
    reader = CacheReader.of(draft)
    (stream, *_) = vector_streams(reader.manifest)
    key = f"{stream.path}/escapes/count/c/1/0"
    data = bytearray(draft.read(key))
    data[0] ^= 1
    draft.write(key, bytes(data))
    with pytest.raises(StoreError, match="escapes/count"):
        next(SourceRows(reader).codes(stream, SourcePiece(block=1, start=0, stop=4, to=0)))


class GivenBlock(BlockLoader):
    """What `SourceRows` asks of a reader of one block whose arrays are at hand."""

    def __init__(self, manifest: Manifest, arrays: dict[str, Any]) -> None:
        self.manifest = manifest
        self._layout, self._arrays = StoreLayout.of(manifest), arrays

    def load_array(self, path: str, block: int, part: Any = None) -> NDArray[Any]:
        return self._arrays[path]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), start=st.integers(0, 3), count=st.integers(1, 4))
def test_escapes_belong_to_their_rows(
    plain_manifest: Callable[..., Manifest], seed: int, start: int, count: int
) -> None:
    """Four rows of two views: a third of all codes is beyond its packing, at the ends of rows as well."""
    components = {"wide": 0, "byte": 8, "pair": 8, "triple": 8, "five": 0, "zero": 8}
    record = TransformRecord(step=1.0, nmse=0.01, components=components)
    targets = TargetSpecs(hidden=(HiddenSpec(layer=2, codec="nmse:0.01", view="masked"),))
    manifest = plain_manifest(targets, rows=4, block_rows=4, seq_len=2, views=2, calibration={"hidden/2": record})
    (stream,) = vector_streams(manifest)
    generator = np.random.default_rng(seed)
    codes_DWN = generator.integers(-2, 3, (32, 2, 8)).astype(np.int16)
    codes_DWN[24:] = 0
    wild = generator.random(codes_DWN.shape) < 1 / 3
    codes_DWN[wild] = generator.integers(-(2**15) + 1, 2**15, int(wild.sum()))
    arrays = {
        spec.path: np.zeros(spec.block_shape, dtype=spec.dtype) for spec in StoreLayout.of(manifest).arrays.values()
    }
    # more room than a store has: a third of its codes would be refused
    for name in ("index", "value"):
        arrays[f"hidden/2/escapes/{name}"] = np.zeros((2, 32 * 8), dtype=arrays[f"hidden/2/escapes/{name}"].dtype)
    for view in range(2):
        packed = pack_codes(torch.from_numpy(codes_DWN[:, view].copy()), components)
        escapes = len(packed.escape_index)
        arrays["hidden/2/escapes/index"][view, :escapes] = packed.escape_index
        arrays["hidden/2/escapes/value"][view, :escapes] = packed.escape_value
        arrays["hidden/2/escapes/count"][view] = escapes
        for name, values in packed.packed.items():
            arrays[f"hidden/2/codes/{name}"][:, view * values.shape[1] : (view + 1) * values.shape[1]] = values
    stop = min(start + count, 4)
    rows = SourceRows(GivenBlock(manifest, arrays))  # type: ignore[arg-type]
    have = torch.stack([*rows.codes(stream, SourcePiece(block=0, start=start, stop=stop, to=0))], dim=1)
    assert np.array_equal(have.numpy(), codes_DWN[:, :, 2 * start : 2 * stop])
