"""Which checkpoints are loaded: real ones of every ZeRO stage on one process, and none that others may have made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from student_train.engine.checkpoint import save_checkpoint
from student_train.engine.trust import check_trust, close_to_others
from teacher_cache.errors import TrainingError
from tests.student_train.engine.test_checkpoint import draw_and_step, toy_engine


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(params=[0, 1, 2])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    before = os.umask(0o002)  # as where every user has a group
    try:
        engine = toy_engine(stage=request.param)
        draw_and_step(engine)
        return save_checkpoint(engine, tmp_path, step=1, identity={}, state={"tokens": 17})
    finally:
        os.umask(before)


def test_what_we_write_is_trusted_whatever_the_umask(checkpoint: Path) -> None:
    check_trust(checkpoint)


@pytest.mark.parametrize("others", [0o020, 0o002])
def test_what_others_may_write_is_refused(checkpoint: Path, others: int) -> None:
    for one in (checkpoint, next(checkpoint.glob("*.pt"))):
        one.chmod(one.stat().st_mode | others)
        with pytest.raises(TrainingError, match=r"may be written by others \(.*--trust-checkpoint"):
            check_trust(checkpoint)
        close_to_others(checkpoint)
        check_trust(checkpoint)


def test_what_another_user_owns_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = checkpoint.stat().st_uid
    if owner == 0:
        os.chown(next(checkpoint.glob("*.pt")), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(TrainingError, match="belongs to user"):
        check_trust(checkpoint)


def test_what_would_run_is_refused_and_does_not_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = next(checkpoint.glob("*.pt"))
    torch.save({"kdtrain": Evil()}, file)
    close_to_others(checkpoint)
    with pytest.raises(TrainingError, match=r"names (posix|nt)\.system"):
        check_trust(checkpoint)
    file.write_bytes(b"\x80\x02cposix\nsystem\n.")
    with pytest.raises(TrainingError, match="is not what DeepSpeed writes"):
        check_trust(checkpoint)
    assert not (tmp_path / "pwned").exists()
