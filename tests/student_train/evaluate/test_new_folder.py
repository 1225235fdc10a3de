"""New folders that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_train.evaluate.new_folder import check_new_folder, whole_folder
from teacher_cache.errors import SettingsError


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    def stopped() -> None:
        with whole_folder("--out", tmp_path / "a" / "it") as folder:
            (folder / "file").write_text("half")
            assert not (tmp_path / "a" / "it").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list((tmp_path / "a").iterdir()) == []
    with whole_folder("--out", tmp_path / "a" / "it") as folder:
        (folder / "file").write_text("whole")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["it"]
    assert (tmp_path / "a" / "it" / "file").read_text() == "whole"


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_new_folder("--out", tmp_path / "out", tmp_path / "student")
    with whole_folder("--out", tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_what_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(SettingsError, match=r"--save '.*file/out' cannot be written .*nothing is left")
    with refused, whole_folder("--save", tmp_path / "file" / "out"):
        pass
    with pytest.raises(SettingsError, match=r"--save '.*file' exists"):
        check_new_folder("--save", tmp_path / "file", tmp_path / "student")
    with pytest.raises(SettingsError, match=r"cannot be a folder \(File name too long\)"):
        check_new_folder("--save", tmp_path / ("x" * 300), tmp_path / "student")
