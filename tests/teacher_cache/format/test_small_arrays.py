"""Small arrays are what zarr reads, whatever their shape and numbers, and nothing at all once a byte is changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from teacher_cache.errors import StoreError
from teacher_cache.format.small_arrays import (
    encode_constant,
    encode_groups,
    has_constant,
    read_constant,
    write_constant,
    write_metadata,
)
from teacher_cache.storage.local import LocalStorage

PATH = "hidden/2/mean"
VALUES = {
    "a matrix": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "a vector": np.array([1.5, -2.0, np.inf], dtype=np.float32),
    "a number": np.array(0.1),
    "zeros": np.zeros((4, 2), dtype=np.float32),
    "halves": np.array([-1, 2**10], dtype=np.float16),
    "a vector of doubles": np.array([-1, 2**40], dtype=np.float64),
}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_written_is_read_by_zarr_and_by_us(storage: LocalStorage, value: NDArray[np.generic]) -> None:
    assert not has_constant(storage, PATH)
    write_constant(storage, PATH, value)
    assert has_constant(storage, PATH)
    assert len(storage.list(f"{PATH}/")) == 2, "zeros are a chunk too: what is missing must not be read as zeros"
    for have in (
        read_constant(storage, PATH),
        np.asarray(zarr.open_array(f"{storage.location}/{PATH}", mode="r")[...]),
    ):
        assert have.dtype == value.dtype and have.shape == value.shape
        assert np.array_equal(have, value)


def test_another_value_takes_the_place_of_the_first(storage: LocalStorage) -> None:
    for value in (VALUES["a vector"], VALUES["a vector"][::-1]):
        write_constant(storage, PATH, value)
        assert np.array_equal(read_constant(storage, PATH), value)


def test_its_chunk_comes_last_and_the_groups_around_it_first() -> None:
    keys = list(encode_constant(PATH, VALUES["a vector"]))
    assert keys == ["hidden/2/mean/zarr.json", "hidden/2/zarr.json", "hidden/zarr.json", "hidden/2/mean/c/0"]


def test_every_changed_byte_of_the_numbers_is_found(storage: LocalStorage) -> None:
    write_constant(storage, PATH, VALUES["a vector"])
    data = storage.read(f"{PATH}/c/0")
    for place in range(len(data)):
        storage.write(f"{PATH}/c/0", data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(StoreError, match="is damaged: 'hidden/2/mean' cannot be read"):
            read_constant(storage, PATH)
    storage.write(f"{PATH}/c/0", data)
    assert np.array_equal(read_constant(storage, PATH), VALUES["a vector"])


@pytest.mark.parametrize("lost", ["zarr.json", "c/0"])
def test_half_of_one_is_none(storage: LocalStorage, lost: str) -> None:
    write_constant(storage, PATH, VALUES["a vector"])
    storage.delete(f"{PATH}/{lost}")
    assert not has_constant(storage, PATH)
    with pytest.raises(StoreError, match="No such file|has None bytes"):
        read_constant(storage, PATH)


def test_metadata_that_says_the_same_is_not_written_again(storage: LocalStorage) -> None:
    metadata = encode_groups([PATH])
    assert sorted(metadata) == ["hidden/2/zarr.json", "hidden/zarr.json"]
    # as another version of zarr might put it, under a seal
    spaced = json.dumps(json.loads(metadata["hidden/zarr.json"]), indent=7).encode()
    storage.write("hidden/zarr.json", spaced)
    storage.write("hidden/2/zarr.json", b"{")
    write_metadata(storage, metadata)
    assert storage.read("hidden/zarr.json") == spaced
    assert storage.read("hidden/2/zarr.json") == metadata["hidden/2/zarr.json"]
