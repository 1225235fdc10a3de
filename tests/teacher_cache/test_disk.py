"""Writing that is whole or not there, and what an operating system says where it refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from teacher_cache.disk import NO_SPACE, system_error_number, write_whole


@pytest.fixture
def full_disk() -> Path:
    place = Path("/dev/full")
    if not place.exists():
        pytest.skip("this system has no device that is always full")
    return place


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_whole(path, "first")
    write_whole(path, "zweite Fassung ü")
    assert path.read_text(encoding="utf-8") == "zweite Fassung ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, full_disk: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("first")
    # what stands where the unfinished file goes takes no byte
    (tmp_path / f"record.json.{os.getpid()}.tmp").symlink_to(full_disk)
    with pytest.raises(OSError) as caught:
        write_whole(path, "second")
    assert system_error_number(caught.value) in NO_SPACE
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "record.json", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "error, number",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError("no number"), 0),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 28),
        (RuntimeError("something else"), 0),
    ],
)
def test_the_number_of_an_error_is_found_where_it_stands(error: Exception, number: int) -> None:
    assert system_error_number(error) == number
