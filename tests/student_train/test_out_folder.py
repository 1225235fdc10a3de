"""What the operating system refuses while writing, as a message; /dev/full refuses every write as a full disk does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from student_train.out_folder import explain_write_errors, refuse_file
from teacher_cache.errors import SpaceError, TrainingError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
def test_a_full_disk_while_writing_a_file():
    told = r"'OUT' \(No space left on device\).*safe; free some space.*--resume auto"
    with pytest.raises(SpaceError, match=told), explain_write_errors(Path("OUT")), FULL.open("w") as stream:
        stream.write("text")


@needs_full
def test_a_full_disk_while_torch_writes_though_it_hides_the_number():
    with pytest.raises(SpaceError, match="free some space"), explain_write_errors(Path("OUT")):
        torch.save({"weight": torch.zeros(1000)}, FULL)


def test_what_safetensors_cannot_write_is_told_by_its_number(tmp_path):
    (tmp_path / "file").touch()
    told = r"cannot write 'OUT' \(Not a directory\).*--out"
    with pytest.raises(TrainingError, match=told), explain_write_errors(Path("OUT")):
        save_file({"weight": torch.zeros(1)}, tmp_path / "file" / "model.safetensors")


def test_other_errors_keep_their_meaning():
    with pytest.raises(RuntimeError, match="shapes differ"), explain_write_errors(Path("OUT")):
        raise RuntimeError("shapes differ")


def test_what_cannot_become_a_folder_is_refused(tmp_path):
    refuse_file(tmp_path)
    refuse_file(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file' is a file: the student needs a directory"):
        refuse_file(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"cannot be a directory \(File name too long\).*choose another --out"):
        refuse_file(tmp_path / ("9" * 300))
