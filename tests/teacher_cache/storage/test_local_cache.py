"""Copies of what lies in a bucket: they save requests, stay within their bound, and give nothing but the store."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.read.pool import CacheSource, open_caches
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.local_cache import LocalCache, open_local_cache

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.teacher_cache.conftest import FaultyServer

EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)
PLENTY = 2**30
SHARERS = """
import hashlib, os, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from teacher_cache.storage.local_cache import LocalCache
objects = [random.Random(number).randbytes(1000) for number in range(40)]
copies = LocalCache(sys.argv[1], 12_000)
def use(seed):
    for number in random.Random(f"{sys.argv[2]} {seed}").choices(range(40), k=300):
        name = hashlib.sha256(objects[number]).hexdigest()
        found = copies.read(name)
        assert found in (None, objects[number])
        if found is None:
            copies.keep(name, objects[number])
with ThreadPoolExecutor(4) as pool:
    seed = 0
    while os.getppid() == int(sys.argv[4]) and not Path(sys.argv[3]).exists():
        list(pool.map(use, range(seed, seed + 4)))
        seed += 4
"""


@pytest.fixture
def location(small_store: Path, s3: S3Server) -> str:
    """A finished store in a bucket."""
    address = f"{s3.bucket('copies')}/cache.zarr"
    source, target = LocalStorage(small_store), open_storage(address)
    for key in source.list():
        target.write(key, source.read(key))
    return address


def of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in kept(folder))


def asked_for(server: FaultyServer) -> list[str]:
    """The shards, commits and lists of them that were read since the last call; constants are no shards."""
    keys = [line.rpartition("cache.zarr/")[2] for line in server.requests if line.startswith("GET ")]
    server.requests.clear()
    blocks = ("/c/", "commits/", "commits.sha256")
    return [key for key in keys if any(part in key for part in blocks) and "/projection/" not in key]


def assert_same(reader: CacheSource, store: Path) -> None:
    want = CacheReader.open(store)
    for start, stop in ((0, 40), (17, 21)):
        got, wanted = reader.read_rows(start, stop, EVERYTHING), want.read_rows(start, stop, EVERYTHING)
        assert torch.equal(got["masked"].input_ids_BT, wanted["masked"].input_ids_BT)
        assert torch.equal(got["plain"].hidden[4], wanted["plain"].hidden[4])
        assert torch.equal(got["plain"].attention[3].value_BTD, wanted["plain"].attention[3].value_BTD)


def read_through(copies: LocalCache, location: str, store: Path) -> None:
    assert_same(CacheReader.open(location, copies=copies), store)


def test_what_was_read_once_is_not_asked_for_again(
    location: str, small_store: Path, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    folder = tmp_path / "copies"
    read_through(LocalCache(folder, PLENTY), location, small_store)
    first = asked_for(faulty_s3)
    assert len(first) == len(set(first)) > 3, "each object once, though rows 17 to 21 were read twice"
    assert {"hidden/4/codes/c/1/0/0", "commits/00000001.json", "commits.sha256"} < set(first)
    # another run
    read_through(LocalCache(folder, PLENTY), location, small_store)
    assert asked_for(faulty_s3) == []


def test_a_damaged_copy_is_fetched_again_once(
    location: str, small_store: Path, faulty_s3: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = LocalCache(tmp_path, PLENTY)
    read_through(copies, location, small_store)
    for key in ("hidden/4/codes/c/1/0/0", "commits/00000001.json"):
        data = (small_store / key).read_bytes()
        copy = tmp_path / of(data)[:2] / of(data)
        copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        faulty_s3.requests.clear()
        read_through(copies, location, small_store)
        assert asked_for(faulty_s3) == [key]
        assert copy.read_bytes() == data
        assert f"{copy} is damaged" in caplog.text


def test_an_object_that_was_replaced_is_not_read_from_its_old_copy(
    small_store: Path, nmse_store: Path, tmp_path: Path
) -> None:
    """Whatever lies at an address counts: copies know no addresses. A folder stands for the bucket."""
    copies, place = LocalCache(tmp_path / "copies", PLENTY), tmp_path / "cache.zarr"
    for store in (small_store, nmse_store):
        place.unlink(missing_ok=True)
        place.symlink_to(store)
        assert_same(CacheReader.open(place, copies=copies), store)
    assert len(kept(tmp_path / "copies")) > 30


def test_the_bound_is_kept_and_what_was_read_longest_ago_goes_first(tmp_path: Path) -> None:
    objects = [random.Random(number).randbytes(100) for number in range(11)]
    copies = LocalCache(tmp_path, 1000)
    (tmp_path / "notes.txt").write_bytes(b"mine" * 1000)
    for data in objects[:10]:
        copies.keep(of(data), data)
    assert held(tmp_path) == 1000
    assert copies.read(of(objects[0])) == objects[0]
    copies.keep(of(objects[10]), objects[10])
    assert copies.read(of(objects[1])) is None
    assert [copies.read(of(data)) for data in (*objects[:1], *objects[2:])] == [*objects[:1], *objects[2:]]
    copies.keep(of(bytes(1001)), bytes(1001))
    assert held(tmp_path) == 1000, "what does not fit at all drives nothing out"
    # a smaller bound counts from the start, and what a killed process left does not stay
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab" / f"{'ab' * 32}.partial").write_bytes(b"half")
    LocalCache(tmp_path, 350)
    assert held(tmp_path) == 300
    assert (tmp_path / "notes.txt").exists()


def test_processes_and_threads_share_a_folder(tmp_path: Path) -> None:
    """Both go on until they were seen full fifty times."""
    folder, enough = tmp_path / "copies", tmp_path / "enough"
    folder.mkdir()
    shared = [str(enough), str(os.getpid())]
    commands = [[sys.executable, "-c", SHARERS, str(folder), str(number), *shared] for number in range(2)]
    running: list[subprocess.Popen[bytes]] = []
    seen: list[int] = []
    with (folder / "lock").open("w") as lock:
        try:
            running += [subprocess.Popen(command) for command in commands]
            while sum(size > 10_000 for size in seen) < 50 and all(process.poll() is None for process in running):
                fcntl.flock(lock, fcntl.LOCK_EX)
                seen.append(held(folder))
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.001)
        finally:
            enough.touch()
    assert [process.wait() for process in running] == [0, 0]
    assert max(seen) <= 12_000
    assert (folder / "lock").read_text() == str(held(folder))


def test_threads_read_a_store_that_is_larger_than_the_bound(small_store: Path, tmp_path: Path) -> None:
    copies = LocalCache(tmp_path, 20_000)

    def read(_: int) -> None:
        assert_same(CacheReader.open(small_store, copies=copies), small_store)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(6)))
    assert 10_000 < held(tmp_path) <= 20_000


def test_what_cannot_be_kept_is_read_all_the_same(
    small_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = LocalCache(tmp_path, PLENTY)
    for number in range(256):
        (tmp_path / f"{number:02x}").touch()  # a file where a folder would have to be
    assert_same(CacheReader.open(small_store, copies=copies), small_store)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"no more copies are kept in {tmp_path}"
    ]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"no copies of the store can be kept in '.*file/copies'.*every epoch"):
        open_local_cache(str(tmp_path / "file" / "copies"), gib=1)
    assert open_local_cache(None, gib=1) is None


def test_stores_of_this_machine_are_not_copied(small_store: Path, tmp_path: Path) -> None:
    reader = open_caches([str(small_store)], local_cache=str(tmp_path))
    reader.read_rows(0, 40, EVERYTHING)
    assert kept(tmp_path) == []
