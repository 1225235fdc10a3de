"""What a folder does beyond what every storage must: names reach the disk, and a disk that fails is a message."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import StoreError
from teacher_cache.storage.local import LocalStorage


def test_names_of_new_folders_reach_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("teacher_cache.storage.local.flush_to_disk", flushed.append)
    storage = LocalStorage(tmp_path / "store")
    storage.write("hidden/2/codes", b"1")
    hidden = tmp_path / "store" / "hidden"
    assert flushed == [hidden / "2", hidden, tmp_path / "store", tmp_path]
    flushed.clear()
    storage.write("hidden/2/other", b"2")
    assert flushed == [hidden / "2"]


def test_a_file_that_is_deleted_while_files_are_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"1")
    walk = os.walk

    def delete_meanwhile(top: Path) -> Iterator[Any]:
        for found in walk(top):
            (tmp_path / "a").unlink()
            yield found

    monkeypatch.setattr("teacher_cache.storage.local.os.walk", delete_meanwhile)
    assert LocalStorage(tmp_path).list() == {"b": 1}


def test_what_cannot_be_read_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permissions, or a disk that fails: a superuser may read everything, so the error comes from the call."""
    storage = LocalStorage(tmp_path)
    storage.write("key", b"1")

    def fail(path: Path) -> io.FileIO:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(io, "FileIO", fail)
    with pytest.raises(StoreError, match="cannot read .*key.* .Input/output error.: .*restore the store"):
        storage.read("key")
