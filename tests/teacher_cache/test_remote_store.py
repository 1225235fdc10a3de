"""A store in a bucket is the store on a disk: built, interrupted, read, and opened with plain zarr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import zarr

from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import METADATA, SEAL
from teacher_cache.read.info import describe_store
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.faulty_server import FaultyServer

Settings = Callable[..., BuildSettings]
EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)


def objects_of(storage: Storage) -> dict[str, bytes]:
    """Every object but the root manifest, which records time and command line, and the seal, which holds its hash."""
    return {key: storage.read(key) for key in storage.list() if key not in (METADATA, SEAL)}


class FailsLater(Silent):
    """Has the server fail once the first block is committed."""

    def __init__(self, server: FaultyServer, seconds: float = 3) -> None:
        self.server = server
        self.seconds = seconds
        self.failed = False

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        if rows and not self.failed:
            self.failed = True
            self.server.outage("errors", self.seconds)


def test_a_build_outlives_an_outage_and_ends_as_on_a_disk(
    small_settings: Settings, nmse_store: Path, s3: S3Server, faulty_s3: FaultyServer
) -> None:
    location = f"{s3.bucket('outage')}/caches/one.zarr"
    build_cache(small_settings(location, precision="nmse:1e-2", views=2), FailsLater(faulty_s3))  # type: ignore[arg-type]
    assert faulty_s3.failed, "the server did fail"
    assert objects_of(open_storage(location)) == objects_of(LocalStorage(nmse_store))
    have, want = (CacheReader.open(path).read_rows(3, 37, EVERYTHING, masked_view=1) for path in (location, nmse_store))
    for view in ("plain", "masked"):
        assert torch.equal(have[view].input_ids_BT, want[view].input_ids_BT)
    assert torch.equal(have["plain"].hidden[4], want["plain"].hidden[4])
    assert torch.equal(have["plain"].attention[3].value_BTD, want["plain"].attention[3].value_BTD)
    assert (CacheReader.open(location).teacher_folder() / "config.json").is_file()
    info, local = describe_store(location), describe_store(nmse_store)
    assert (info.sealed, info.bytes_per_array) == (True, local.bytes_per_array)


def test_a_build_that_gives_up_says_so_and_goes_on_later(
    small_settings: Settings,
    small_store: Path,
    s3: S3Server,
    faulty_s3: FaultyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    location = f"{s3.bucket('gives-up')}/cache.zarr"
    settings = small_settings(location)  # type: ignore[arg-type]
    monkeypatch.setenv("KDCACHE_RETRY_SECONDS", "1")
    with pytest.raises(StoreError, match="run the same command again"):
        build_cache(settings, FailsLater(faulty_s3, 6))
    with pytest.raises(StoreError, match="unfinished"):
        _open_after_outage(location, s3, monkeypatch)
    report = build_cache(settings)
    assert 0 < report.computed_rows <= 40
    assert objects_of(open_storage(location)) == objects_of(LocalStorage(small_store))


def _open_after_outage(location: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    CacheReader.open(location)


def test_damage_in_a_bucket_is_refused_and_refilled(small_settings: Settings, small_store: Path, s3: S3Server) -> None:
    location = f"{s3.bucket('damage')}/cache.zarr"
    settings = small_settings(location)  # type: ignore[arg-type]
    build_cache(settings)
    storage = open_storage(location)
    key = "hidden/2/codes/c/1/0/0"
    storage.write(key, storage.read(key)[:-5])
    with pytest.raises(StoreError, match="'hidden/2/codes/c/1/0/0' .* has .* bytes instead of"):
        CacheReader.open(location).read_rows(16, 20, EVERYTHING)
    assert build_cache(settings).computed_rows == 16
    assert objects_of(storage) == objects_of(LocalStorage(small_store))


def test_plain_zarr_reads_a_store_in_a_bucket(small_settings: Settings, s3: S3Server) -> None:
    import obstore

    location = f"{s3.bucket('plain')}/cache.zarr"
    build_cache(small_settings(location))  # type: ignore[arg-type]
    store = obstore.store.from_url(location, client_options={"allow_http": True})
    codes = zarr.open_array(zarr.storage.ObjectStore(store, read_only=True), path="hidden/4/codes", mode="r")
    want = CacheReader.open(location).read_rows(16, 18, EVERYTHING)["plain"].hidden[4]
    have = np.asarray(codes[1])[:, : 2 * 24].T.reshape(2, 24, 32)
    assert np.array_equal(have.astype(np.float32), want.numpy())


def test_stores_in_a_bucket_and_on_a_disk_make_one_corpus(
    small_settings: Settings, s3: S3Server, tmp_path: Path
) -> None:
    places = [f"{s3.bucket('parts')}/1.zarr", str(tmp_path / "2.zarr")]
    for number, place in enumerate(places, start=1):
        build_cache(small_settings(place, part=f"{number}/2"))  # type: ignore[arg-type]
    assert open_caches(places).rows == 40
