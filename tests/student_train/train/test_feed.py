"""The next batch: shares of it, rows of damaged blocks that are skipped, and a store that is gone."""

import json
import shutil
from contextlib import closing

import pytest
import torch

from student_train.engine.checkpoint import newest_checkpoint
from student_train.settings import TrainSettings
from student_train.train.loop import Trainer
from student_train.train.prepare import prepare_run
from teacher_cache.errors import StoreError
from tests.student_train.train.trainings import BATCH, STEPS, steps_of


def test_targets_are_decoded_pass_by_pass(tiny_store):
    """Not the whole share at once, whatever a pass may hold."""
    settings = TrainSettings(method="hs", cache=(str(tiny_store),), steps=1, batch_size=16, device="cpu")
    with closing(prepare_run(settings).training_batches(0)) as batches:
        batch = next(batches)
        whole = batch.views["plain"].hidden[2]
        parts = [batch.part(start, start + 3) for start in range(0, 16, 3)]
        assert [len(part["plain"].length_B) for part in parts] == [3, 3, 3, 3, 3, 1] and batch.part(16, 19) == {}
        assert torch.equal(torch.cat([part["plain"].hidden[2] for part in parts]), whole)


def test_rows_of_a_damaged_block_can_be_skipped(run_training, finished, damaged_store, tmp_path, capsys):
    """All other rows stay in the batches they are in, the missing ones are counted and every step has its mean."""
    (store, _), out = damaged_store, tmp_path / "student"
    records = steps_of(run_training(out, cache=(str(store),), on_bad_block="skip"))
    whole = steps_of(finished[1])
    first = next(step for step, record in enumerate(records) if "skipped_rows" in record)
    assert records[:first] == whole[:first]
    assert records[first]["loss"] != whole[first]["loss"]
    # two epochs of 96 rows: block 5 is met twice
    assert records[-1]["skipped_rows"] == 16 and records[-1]["rows"] == STEPS * BATCH - 16
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 1 and "block 5 of" in told[0]
    result = json.loads((out / "provenance.json").read_text())["result"]
    assert result["skipped_rows"] == 16 and result["step"] == STEPS


def test_batches_of_damaged_rows_alone_are_passed_over(run_training, damaged_store, tmp_path):
    """Of 12 batches of 8 rows, one is the damaged block: no step is made on nothing."""
    store, _ = damaged_store
    out = tmp_path / "student"
    records = steps_of(run_training(out, cache=(str(store),), on_bad_block="skip", batch_size=8, valid_every=STEPS))
    assert [record["rows"] for record in records] == [8 * step for step in range(1, STEPS + 1)]
    assert records[-1]["skipped_rows"] == 8
    assert all(record["loss"] > 0 for record in records)


def test_a_store_of_which_nothing_can_be_read_stops_the_run(run_training, tiny_store, tmp_path, monkeypatch):
    """What disappears on the way is damage in every block; the run does not go round for ever."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    update = Trainer.update

    def update_and_lose(trainer, feed):
        went_on = update(trainer, feed)
        shutil.rmtree(store, ignore_errors=True)
        return went_on

    monkeypatch.setattr(Trainer, "update", update_and_lose)
    with pytest.raises(StoreError, match=r"no row of .* can be read[^$]*steps are saved in"):
        run_training(tmp_path / "student", cache=(str(store),), on_bad_block="skip")
    assert newest_checkpoint(tmp_path / "student") is not None
