"""Shards are encoded byte for byte as real zarr does, decoded as zarr reads them, and damage is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.shards import create_array, decode_shard, encode_shard

DTYPES = ("int8", "uint8", "int16", "int32", "int64", "float16", "float32")
BLOCKS = 2


def random_block(seed: int, spec: ArraySpec) -> NDArray[Any]:
    """Small numbers of any type, and sometimes nothing but zeros."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, generator.integers(1, 100), spec.block_shape).astype(spec.dtype)


def written(folder: Path, spec: ArraySpec, *blocks: NDArray[Any]) -> tuple[zarr.Array[Any], list[bytes]]:
    """The array as zarr writes it to a folder, and the bytes of its shards."""
    array = create_array(zarr.open_group(str(folder), mode="w"), spec, len(blocks))
    for number, block in enumerate(blocks):
        array[number] = block
    inside = "/".join("0" for _ in spec.block_shape)
    shards = [(folder / spec.path / "c" / str(number) / inside).read_bytes() for number in range(len(blocks))]
    return array, shards


@st.composite
def specs(draw: st.DrawFn) -> ArraySpec:
    axes = draw(st.integers(1, 3))
    chunk = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    block = tuple(length * draw(st.integers(1, 4)) for length in chunk)
    path = draw(st.sampled_from(["codes", "hidden/3/codes"]))
    return ArraySpec(path=path, dtype=draw(st.sampled_from(DTYPES)), block_shape=block, chunk_shape=chunk)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs(), seed=st.integers(0, 2**31), data=st.data())
def test_blocks_and_parts_decode_as_zarr_reads_them(
    spec: ArraySpec, seed: int, data: st.DataObject, tmp_path: Path
) -> None:
    array, shards = written(tmp_path, spec, *(random_block(seed + block, spec) for block in range(BLOCKS)))
    part = []
    for length in spec.block_shape:
        start = data.draw(st.integers(0, length))
        part.append(slice(start, data.draw(st.integers(start, length))))
    plain = zarr.open_array(str(tmp_path / spec.path), mode="r")
    for block, shard in enumerate(shards):
        for hashed in (False, True):
            whole = decode_shard(spec, shard, hashed=hashed)
            some = decode_shard(spec, shard, tuple(part), hashed=hashed)
            assert whole.dtype == some.dtype == array.dtype
            assert whole.flags.writeable and some.flags.writeable
            assert np.array_equal(whole, plain[block])
            assert np.array_equal(some, plain[(block, *part)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs(), seed=st.integers(0, 2**31), empty=st.floats(0, 1), views=st.booleans())
def test_blocks_are_encoded_byte_for_byte_as_zarr_does(
    spec: ArraySpec, seed: int, empty: float, views: bool, tmp_path: Path
) -> None:
    """With rows of zeros at the end, as the last block of a store has, and chunks of nothing else."""
    block = random_block(seed, spec)
    block[int(len(block) * empty) :] = 0
    if spec.dtype.startswith("float") and empty > 0.5:
        block = -block  # zeros with a sign are no zeros to zstd
    given_block = np.asfortranarray(block) if views else block
    _, (shard,) = written(tmp_path, spec, block)
    assert encode_shard(spec, given_block) == shard


@pytest.mark.parametrize(
    "block, chunk, dtype",
    [
        ((24, 2 * 4096), (8, 4096), "int8"),
        ((12, 3, 40, 40), (1, 1, 40, 40), "float16"),
        ((2, 6 * 2**14), (1, 2**14), "int32"),
    ],
)
def test_real_shapes_are_encoded_as_zarr_does(
    block: tuple[int, ...], chunk: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    """Packed components of two views, relation matrices, and a ragged array of which a part is filled."""
    spec = ArraySpec(path="a", dtype=dtype, block_shape=block, chunk_shape=chunk)
    values = np.random.default_rng(0).normal(0, 4, block).round().astype(dtype)
    if dtype == "int32":
        values[:, 20_000:] = 0
    _, (shard,) = written(tmp_path, spec, values)
    assert encode_shard(spec, values) == shard
    assert np.array_equal(decode_shard(spec, shard), values)


def test_a_block_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a block of a has shape \(4, 6\), and \(6, 4\) was given"):
        encode_shard(SMALL, np.zeros((6, 4), dtype=np.int16))


def test_real_shapes_decode_as_zarr_reads_them(tmp_path: Path) -> None:
    views, tokens = 2, 4096
    spec = ArraySpec(path="a", dtype="int8", block_shape=(24, views * tokens), chunk_shape=(8, tokens))
    block = np.random.default_rng(0).normal(0, 4, spec.block_shape).round().astype(np.int8)
    array, (shard,) = written(tmp_path, spec, block)
    for part in (slice(0, tokens), slice(tokens, 2 * tokens), slice(tokens - 3, tokens + 3), slice(None)):
        assert np.array_equal(decode_shard(spec, shard, (slice(3, 17), part)), array[0, 3:17, part])
    assert np.array_equal(decode_shard(spec, shard), block)


SMALL = ArraySpec(path="a", dtype="int16", block_shape=(4, 6), chunk_shape=(2, 3))


@pytest.fixture
def small(tmp_path: Path) -> tuple[NDArray[Any], bytes]:
    block = random_block(1, SMALL)
    _, (shard,) = written(tmp_path, SMALL, block)
    return block, shard


def test_no_flipped_byte_goes_unnoticed(small: tuple[NDArray[Any], bytes]) -> None:
    _, shard = small
    for place in range(len(shard)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(shard)
            damaged[place] ^= change
            with pytest.raises(ValueError, match=r"checksum"):
                decode_shard(SMALL, bytes(damaged))


def test_checksums_repeat_what_a_hash_has_said(small: tuple[NDArray[Any], bytes]) -> None:
    """Of bytes that are hashed neither checksum of a chunk is looked at; where chunks are and how long they are, is."""
    block, shard = small
    entries = np.frombuffer(shard[-4 - 4 * 16 : -4], dtype="<u8").reshape(4, 2).tolist()
    damaged = bytearray(shard)
    for offset, size in entries:
        # the frame's own of its contents, and the one of the frame
        damaged[offset + size - 8 : offset + size] = bytes(8)
    assert np.array_equal(decode_shard(SMALL, bytes(damaged), hashed=True), block)
    assert bytes(damaged) != shard
    with pytest.raises(ValueError, match=r"chunk 0 does not match its checksum"):
        decode_shard(SMALL, bytes(damaged))
    offset = entries[2][0]
    # the type of its first block, behind the magic number, the descriptor and the size: the one that is reserved
    damaged[offset + 6] |= 0b110
    with pytest.raises(ValueError, match=r"chunk 2 cannot be decompressed"):
        decode_shard(SMALL, bytes(damaged), hashed=True)
    damaged[offset : offset + 4] = bytes(4)
    with pytest.raises(ValueError, match=r"chunk 2 holds None bytes instead of 12"):
        decode_shard(SMALL, bytes(damaged), hashed=True)


def test_frames_without_a_checksum_are_read_as_well(tmp_path: Path) -> None:
    """Another writer's: nothing is cut off."""
    spec = ArraySpec(path="a", dtype="uint8", block_shape=(600,), chunk_shape=(300,))
    block = np.arange(600, dtype=np.uint8)
    array = zarr.create_array(
        str(tmp_path),
        shape=(1, 600),
        shards=(1, 600),
        chunks=(1, 300),
        dtype="uint8",
        compressors=[ZstdCodec(level=1, checksum=False), Crc32cCodec()],
    )
    array[0] = block
    shard = (tmp_path / "c/0/0").read_bytes()
    for hashed in (False, True):
        assert np.array_equal(decode_shard(spec, shard, hashed=hashed), block)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_second_frame_is_refused(hashed: bool) -> None:
    """One more as long as the first would be written behind the chunk's place."""
    spec = ArraySpec(path="a", dtype="uint8", block_shape=(300,), chunk_shape=(300,))
    frame = bytes(zstd.compress(np.arange(300, dtype=np.uint8), 1, True))
    chunk = frame + frame
    index = np.array([0, len(chunk) + 4], dtype="<u8").tobytes()
    shard = b"".join([chunk, crc32c(chunk), index, crc32c(index)])
    with pytest.raises(ValueError, match=r"chunk 0 cannot be decompressed"):
        decode_shard(spec, shard, hashed=hashed)


def crc32c(data: bytes) -> bytes:
    return google_crc32c.value(data).to_bytes(4, "little")


def test_a_part_needs_only_the_chunks_that_it_touches(small: tuple[NDArray[Any], bytes]) -> None:
    block, shard = small
    offset, size = np.frombuffer(shard[-4 - 4 * 16 : -4], dtype="<u8").reshape(4, 2)[3].tolist()
    damaged = bytearray(shard)
    damaged[offset : offset + size] = bytes(size)
    assert np.array_equal(decode_shard(SMALL, bytes(damaged), (slice(0, 4), slice(0, 3))), block[:, :3])
    with pytest.raises(ValueError, match=r"chunk 3 does not match its checksum"):
        decode_shard(SMALL, bytes(damaged), (slice(3, 4), slice(0, 4)))


def test_shards_cut_short_or_grown_are_refused(small: tuple[NDArray[Any], bytes]) -> None:
    _, shard = small
    for length in range(len(shard)):
        with pytest.raises(ValueError, match=r"index"):
            decode_shard(SMALL, shard[:length])
        with pytest.raises(ValueError, match=r"chunk|index"):
            decode_shard(SMALL, shard[length + 1 :])
        with pytest.raises(ValueError, match=r"index"):
            decode_shard(SMALL, shard[:length], hashed=True)
    with pytest.raises(ValueError, match=r"index does not match its checksum"):
        decode_shard(SMALL, shard + b"\0")


def test_chunks_that_were_not_written_are_no_zeros(tmp_path: Path) -> None:
    spec = ArraySpec(path="a", dtype="int32", block_shape=(4,), chunk_shape=(2,))
    array = zarr.create_array(str(tmp_path), shape=(1, 4), shards=(1, 4), chunks=(1, 2), dtype="int32", compressors=[])
    array[0, 2:] = 1
    shard = (tmp_path / "c/0/0").read_bytes()
    with pytest.raises(ValueError, match=r"chunk 0 is missing"):
        decode_shard(spec, shard)


def test_shards_of_another_array_are_refused(small: tuple[NDArray[Any], bytes]) -> None:
    _, shard = small
    for change in (
        {"dtype": "int8"},
        {"dtype": "float32"},
        {"block_shape": (4, 4), "chunk_shape": (2, 2)},
        {"block_shape": (4, 12), "chunk_shape": (2, 6)},
        {"block_shape": (4, 12)},
        {"block_shape": (2, 6)},
    ):
        other = ArraySpec(**{**vars(SMALL), **change})
        with pytest.raises(ValueError, match=r"index|instead of"):
            decode_shard(other, shard)


@pytest.mark.parametrize("length", [1, 40, 255, 256, 257, 5000, 65791, 65792, 300_000])
def test_frames_of_every_length_state_it(length: int, tmp_path: Path) -> None:
    """The field that says how long a frame's contents are has four widths."""
    spec = ArraySpec(path="a", dtype="uint8", block_shape=(length,), chunk_shape=(length,))
    block = np.arange(length, dtype=np.uint8)
    _, (shard,) = written(tmp_path, spec, block)
    assert np.array_equal(decode_shard(spec, shard), block)
    assert np.array_equal(decode_shard(spec, shard, hashed=True), block)
    shorter = ArraySpec(path="a", dtype="uint8", block_shape=(length + 1,), chunk_shape=(length + 1,))
    with pytest.raises(ValueError, match=rf"chunk 0 holds {length} bytes instead of {length + 1}"):
        decode_shard(shorter, shard)


@pytest.mark.parametrize(
    "part",
    [
        (slice(0, 4),),
        (slice(0, 4), slice(0, 7)),
        (slice(-1, 4), slice(0, 6)),
        (slice(3, 1), slice(0, 6)),
        (slice(0, 4, 2), slice(0, 6)),
    ],
)
def test_parts_that_are_no_range_of_the_block_are_refused(
    part: tuple[slice, ...], small: tuple[NDArray[Any], bytes]
) -> None:
    with pytest.raises(ValueError, match=r"part"):
        decode_shard(SMALL, small[1], part)
