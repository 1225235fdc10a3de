"""A training from object storage whose server fails: it waits, and where that does not help it stops with all saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from student_train.engine.checkpoint import checkpoint_path, newest_checkpoint
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.train.loop import Trainer
from student_train.train.train import train
from teacher_cache.errors import StoreError
from teacher_cache.storage.remote import RemoteStorage
from tests.records import without_times

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.faulty_server import FaultyServer

STEPS, BATCH = 12, 16


def settings_for(cache: str, out: Path, **changes: Any) -> TrainSettings:
    values = {"method": "hs", "cache": (cache,), "out": str(out), "steps": STEPS, "batch_size": BATCH, "device": "cpu"}
    return TrainSettings(**{**values, "valid_share": 5 / 101, "valid_every": STEPS, "save_every": 100, **changes})


def records_of(out: Path) -> list[dict[str, Any]]:
    return without_times(read_records(out / "metrics.jsonl"))


@pytest.fixture
def remote_store(tiny_store: Path, s3: S3Server) -> str:
    """The store, copied into a bucket file by file."""
    location = f"{s3.bucket('training')}/cache.zarr"
    storage = RemoteStorage(location)
    for file in tiny_store.rglob("*"):
        if file.is_file():
            storage.write(str(file.relative_to(tiny_store)), file.read_bytes())
    return location


@pytest.fixture
def outage_at_step_4(faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`outage_at_step_4(seconds)`: the server fails for so long from then on."""

    def plan(seconds: float) -> None:
        update = Trainer.update

        def update_then_fail(trainer: Trainer, feed: Any) -> bool:
            went_on = update(trainer, feed)
            if trainer.state.step == 4:
                faulty_s3.outage("errors", seconds)
            return went_on

        monkeypatch.setattr(Trainer, "update", update_then_fail)

    return plan


def test_a_training_waits_out_an_outage(
    remote_store: str, tiny_store: Path, faulty_s3: FaultyServer, outage_at_step_4: Any, tmp_path: Path
) -> None:
    train(settings_for(str(tiny_store), tmp_path / "local"))
    outage_at_step_4(faulty_s3.outage_seconds)
    train(settings_for(remote_store, tmp_path / "remote"))
    assert faulty_s3.failed > 0
    assert records_of(tmp_path / "remote") == records_of(tmp_path / "local")


def test_a_training_whose_store_is_gone_stops_with_a_checkpoint(
    remote_store: str,
    tiny_store: Path,
    s3: S3Server,
    outage_at_step_4: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Blocks that are on their way already are still trained on. Also where damage would be skipped: this is none."""
    monkeypatch.setenv("KDCACHE_RETRY_SECONDS", "1")
    out = tmp_path / "student"
    outage_at_step_4(600)
    with pytest.raises(
        StoreError, match=rf"block \d+ of {remote_store}[^$]*steps are saved in .*--resume auto"
    ) as told:
        train(settings_for(remote_store, out, on_bad_block="skip"))
    assert "KDCACHE_RETRY_SECONDS" in str(told.value)
    reached = records_of(out)[-1]["step"]
    assert 4 <= reached < STEPS and newest_checkpoint(out) == checkpoint_path(out, reached)
    # back again
    monkeypatch.undo()
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    train(settings_for(remote_store, out, resume="auto"))
    train(settings_for(str(tiny_store), tmp_path / "local"))
    assert records_of(out) == records_of(tmp_path / "local")
