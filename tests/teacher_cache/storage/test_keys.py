"""Names that lead out of a store are refused by every storage, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.errors import StoreError
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.keys import is_safe_key
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.local_cache import LocalCache
from teacher_cache.storage.overlay import Overlay

if TYPE_CHECKING:
    from tests.conftest import S3Server

LEADING_OUT = [
    "",
    "/etc/passwd",
    "..",
    "../other",
    "teacher/../../other",
    "teacher//other",
    "a/./b",
    "a/",
    "a\0b",
    "a\\b",
]

USES: dict[str, Callable[[Storage, str], object]] = {
    "read": lambda storage, key: storage.read(key),
    "stream": lambda storage, key: list(storage.stream(key)),
    "size": lambda storage, key: storage.size(key),
    "write": lambda storage, key: storage.write(key, b"1"),
    "write_file": lambda storage, key: storage.write_file(key, Path(__file__)),
    "delete": lambda storage, key: storage.delete(key),
    "list": lambda storage, key: storage.list(f"{key}/"),
}


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3")
    return open_storage(f"{server.bucket('keys')}/store.zarr")


@pytest.mark.parametrize(
    "use, key",
    # a prefix may end anywhere, with nothing at all too
    [(use, key) for use in USES for key in LEADING_OUT if use != "list" or key not in ("", "a/")],
)
def test_no_use_of_a_storage_leads_out_of_it(storage: Storage, use: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"mine")
    with pytest.raises(StoreError, match="does not lie inside the store"):
        USES[use](storage, key)
    assert (tmp_path / "other").read_bytes() == b"mine"


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "zarr.json", "...", ".hidden"]), min_size=1, max_size=5))
def test_a_safe_key_stays_below_any_root(parts: list[str]) -> None:
    root, key = Path("/some/store"), "/".join(parts)
    if is_safe_key(key):
        assert (root / key).parts[: len(root.parts)] == root.parts
        assert ".." not in (root / key).parts and (root / key) != root
    else:
        assert {"", ".", ".."} & set(parts)


@pytest.mark.parametrize("key", [None, 3, b"bytes", ["list"]])
def test_what_is_no_text_is_no_key(key: object) -> None:
    assert not is_safe_key(key)


def test_a_draft_writes_nothing_outside_either(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not lie inside"):
        Overlay(LocalStorage(tmp_path)).write("../x", b"1")


@pytest.mark.parametrize("name", ["../../victim", "a" * 63, "A" * 64, "g" * 64, ""])
def test_copies_are_named_by_hashes_alone(tmp_path: Path, name: str) -> None:
    copies = LocalCache(tmp_path / "copies", 1000)
    (tmp_path / "victim").write_bytes(b"mine")
    for use in (lambda: copies.read(name), lambda: copies.keep(name, b"data")):
        with pytest.raises(StoreError, match="is no SHA-256"):
            use()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_links_inside_a_store_are_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"mine")
    storage = LocalStorage(tmp_path / "store")
    storage.write("whole", b"1")
    (tmp_path / "store" / "folder").symlink_to(elsewhere)
    (tmp_path / "store" / "file").symlink_to(elsewhere / "file")
    uses: list[Callable[[], object]] = [
        lambda: storage.read("folder/file"),
        lambda: storage.read("file"),
        lambda: storage.write("folder/new", b"2"),
        lambda: storage.write("file", b"2"),
        lambda: storage.delete("folder/file"),
        lambda: storage.size("folder/file"),
        lambda: storage.folder("folder"),
        lambda: storage.list(),
    ]
    for use in uses:
        with pytest.raises(StoreError, match=r"is a link.*replace it by what it leads to"):
            use()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["file"]
    assert (elsewhere / "file").read_bytes() == b"mine"


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    storage = LocalStorage(tmp_path / "store")
    storage.write("a/b", b"1")
    assert storage.read("a/b") == b"1" and (tmp_path / "disk" / "a" / "b").is_file()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    storage = LocalStorage(tmp_path)
    os.mkfifo(tmp_path / "seal.json")
    with pytest.raises(StoreError, match="is no file"):
        storage.read("seal.json")
    assert storage.list() == {}
