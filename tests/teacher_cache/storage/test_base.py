"""What every storage must do, whatever lies behind it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from teacher_cache.errors import StoreError
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage

Open = Callable[[], Storage]
LARGE = random.Random(0).randbytes(9_000_001)
"""Larger than one request carries."""


def local_place(request: pytest.FixtureRequest) -> Open:
    folder: Path = request.getfixturevalue("tmp_path") / "store.zarr"
    return lambda: LocalStorage(folder)


def remote_place(request: pytest.FixtureRequest) -> Open:
    from teacher_cache.storage.remote import RemoteStorage

    location = f"{request.getfixturevalue('s3').bucket('contract')}/{request.node.name}/store.zarr"
    # a holder of the lock proves soon that it lives, and has long to do so
    request.getfixturevalue("monkeypatch").setattr("teacher_cache.storage.lease._RENEWALS", 400)
    return lambda: RemoteStorage(location, lease_seconds=60)


PLACES = {"local": local_place, "remote": remote_place}


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest) -> Open:
    """Opens a storage; every time at the same, at first empty place."""
    return PLACES[request.param](request)


@pytest.fixture
def storage(place: Open) -> Storage:
    return place()


def test_an_object_comes_back(storage: Storage) -> None:
    storage.write("hidden/4/codes/c/0/0/0", b"abc")
    assert storage.read("hidden/4/codes/c/0/0/0") == b"abc"
    assert b"".join(storage.stream("hidden/4/codes/c/0/0/0")) == b"abc"
    assert storage.size("hidden/4/codes/c/0/0/0") == 3


def test_an_empty_object_comes_back(storage: Storage) -> None:
    storage.write("empty", b"")
    assert storage.read("empty") == b""
    assert b"".join(storage.stream("empty")) == b""
    assert storage.size("empty") == 0
    assert storage.list() == {"empty": 0}


def test_a_large_object_comes_back(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    storage.write_file("from/file", source)
    storage.write("from/bytes", LARGE)
    assert storage.read("from/file") == LARGE
    pieces = list(storage.stream("from/bytes"))
    assert b"".join(pieces) == LARGE and len(pieces) > 1
    assert storage.list("from/") == {"from/bytes": len(LARGE), "from/file": len(LARGE)}
    assert source.read_bytes() == LARGE


def test_what_is_absent(storage: Storage) -> None:
    for _ in range(2):  # an empty place, and one that holds something else
        with pytest.raises(FileNotFoundError):
            storage.read("a/b")
        with pytest.raises(FileNotFoundError):
            next(storage.stream("a/b"))
        assert storage.size("a/b") is None
        storage.delete("a/b")
        assert storage.list("a/") == {}
        storage.write("other", b"1")


def test_what_lies_below_an_object_is_absent(storage: Storage) -> None:
    storage.write("a", b"1")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")
    assert storage.size("a/b") is None


def test_a_folder_is_no_object(storage: Storage) -> None:
    storage.write("a/b", b"1")
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    assert storage.size("a") is None


def test_writing_again_replaces(storage: Storage, tmp_path: Path) -> None:
    storage.write("key", b"first, longer")
    storage.write("key", b"second")
    assert storage.read("key") == b"second"
    (tmp_path / "third").write_bytes(b"3")
    storage.write_file("key", tmp_path / "third")
    assert storage.read("key") == b"3"


def test_deleting(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.write("a/c", b"1")
    storage.delete("a/b")
    assert storage.list() == {"a/c": 1}


def test_listing_is_sorted_and_by_prefix_of_the_key(storage: Storage) -> None:
    for key in ("seal.json", "commits/00000001.json", "commits/00000000.json", "commits.json", "zarr.json"):
        storage.write(key, key.encode())
    everything = storage.list()
    assert list(everything) == sorted(everything) and len(everything) == 5
    assert everything["commits.json"] == len("commits.json")
    assert list(storage.list("commits/")) == ["commits/00000000.json", "commits/00000001.json"]
    assert list(storage.list("commits/00000001")) == ["commits/00000001.json"]
    assert list(storage.list("commits")) == ["commits.json", "commits/00000000.json", "commits/00000001.json"]
    assert storage.list("commit/") == {}


def test_hidden_objects_are_not_listed(storage: Storage) -> None:
    storage.write("a/.hidden", b"1")
    storage.write(".hidden/b", b"1")
    assert storage.list() == {}
    assert storage.list("a/") == {}


def test_a_second_look_sees_what_the_first_wrote(place: Open) -> None:
    place().write("key", b"1")
    assert place().read("key") == b"1"


def test_objects_as_a_folder(storage: Storage) -> None:
    storage.write("teacher/config.json", b"{}")
    storage.write("teacher/tokenizer/vocabulary.txt", b"word")
    storage.write("teacher.json", b"other")
    for name in ("teacher", "teacher/"):
        folder = storage.folder(name)
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == {"config.json": b"{}", "tokenizer/vocabulary.txt": b"word"}


def test_one_writer_at_a_time(place: Open) -> None:
    first, second = place(), place()
    with first.lock():
        first.write("key", b"1")
        with pytest.raises(StoreError, match="is being written by"), second.lock():
            pass
        assert first.list() == {"key": 1}
        first.write("key", b"22")
    with second.lock():
        second.write("key", b"333")
    assert first.read("key") == b"333"


def test_the_lock_ends_with_an_error(place: Open) -> None:
    with pytest.raises(ZeroDivisionError), place().lock():
        raise ZeroDivisionError
    with place().lock():
        pass


def test_remains_are_only_removed_if_unfinished(storage: Storage) -> None:
    with storage.lock():
        storage.write("a/b", b"1")
        storage.remove_unfinished()
        assert storage.list() == {"a/b": 1}


def test_scratch_ends_with_its_use(storage: Storage) -> None:
    with storage.lock(), storage.scratch() as folder:
        (folder / "made").write_bytes(b"12")
        storage.write_file("kept", folder / "made")
        assert storage.list() == {"kept": 2}
    assert not folder.exists()
    assert storage.read("kept") == b"12"


def test_room_is_known_or_unlimited(storage: Storage) -> None:
    free = storage.free_bytes()
    assert free is not None and free > 0 if isinstance(storage, LocalStorage) else free is None


def test_many_threads(storage: Storage) -> None:
    def round_trip(number: int) -> bool:
        data = random.Random(number).randbytes(1000 * number)
        storage.write(f"{number % 3}/{number}", data)
        return storage.read(f"{number % 3}/{number}") == data and storage.size(f"{number % 3}/{number}") == len(data)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(40)))
    assert len(storage.list()) == 40


def test_pieces_can_be_left_unread(storage: Storage) -> None:
    storage.write("key", LARGE)
    pieces: Iterator[bytes] = storage.stream("key")
    first = next(pieces)
    assert LARGE.startswith(first)
    del pieces
    assert storage.size("key") == len(LARGE)


@pytest.mark.parametrize("location", ["cache.zarr", "/a/b", "./s3/b", "C:x", "s3", "a/s3://b", "S3://b"])
def test_what_has_no_scheme_is_a_folder(location: str) -> None:
    storage = open_storage(location)
    assert isinstance(storage, LocalStorage) and storage.location == location


@pytest.mark.parametrize("location", ["s3://bucket/store", Path("s3://bucket/store"), "s3:/bucket/store"])
def test_an_address_survives_being_a_path(location: str | Path) -> None:
    """A Path swallows one of two slashes."""
    assert open_storage(location).location == "s3://bucket/store"
