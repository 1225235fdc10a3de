"""Which error of the operating system it was, whatever library it came through; flushing leaves nothing open."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, flush_to_disk, system_error_number, write_whole


@pytest.mark.parametrize(
    "error, number",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (PermissionError(errno.EACCES, "Permission denied", "key"), errno.EACCES),
        (OSError("no number at all"), 0),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), 0),
        # the text of an OSError decides nothing
        (OSError("os error 28"), 0),
        (ValueError(""), 0),
    ],
)
def test_the_number_of_an_error(error: Exception, number: int) -> None:
    assert system_error_number(error) == number


def test_a_full_disk_is_also_a_used_up_quota_or_file_size() -> None:
    assert {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} == NO_SPACE


def test_files_and_folders_can_be_flushed_and_are_closed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for path in (tmp_path / "file", tmp_path):
        flush_to_disk(path)
    with pytest.raises(FileNotFoundError):
        flush_to_disk(tmp_path / "absent")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


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
    (tmp_path / f"record.json.{socket.gethostname()}.{os.getpid()}.tmp").symlink_to(full_disk)
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
