"""The next batch: shares of it, rows of damaged blocks that are skipped, and a store that is gone."""

import json
import shutil
import signal
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from student_train.data.loader import TrainingBatch, WaitingEnded
from student_train.engine.checkpoint import newest_checkpoint
from student_train.engine.ranks import Ranks
from student_train.settings import TrainSettings
from student_train.train.feed import Feed, next_share
from student_train.train.loop import Trainer
from student_train.train.prepare import prepare_run
from teacher_cache.errors import StoreError, TrainingError
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


# ---- by hand --------------------------------------------------------------------------------------------------------


class Batches:
    """In the place of a loader: gives these batches, or raises these errors, one after the other."""

    wait_seconds = 0.25

    def __init__(self, *batches):
        self._batches = iter(batches)

    def __next__(self):
        batch = next(self._batches)
        if isinstance(batch, Exception):
            raise batch
        return batch


def batch_of(rows, *, left_out=0, damage=(), position=0):
    counts = {"positions": 10 * rows, "rows": rows}
    return TrainingBatch(
        position=position, pieces=(), counts=counts, row_ids=tuple(range(rows)), blocks=(), left_out=left_out,
        damage=damage,
    )  # fmt: skip


class TwoRanks(Ranks):
    """This process beside another one, which always tells `other`."""

    def gather(self, value):
        return [value, self.group]


OTHER = ({"positions": 7, "rows": 1}, 2, ("block 9 is damaged",))


def a_run():
    """As much of a run as a feed looks at: batches of 4 rows, 12 rows to train on."""
    return SimpleNamespace(
        ranks=Ranks(),
        settings=SimpleNamespace(batch_size=4),
        training_rows=(range(12),),
        reader=SimpleNamespace(path="cache.zarr"),
    )


def test_counts_are_those_of_all_processes():
    told = []
    ranks = TwoRanks(count=2, group=(None, OTHER, None))
    share = next_share(ranks, Batches(batch_of(3, left_out=1, damage=("block 2 is damaged",))), told.extend, [])
    assert share.counts == {"positions": 37, "rows": 4} and share.left_out == 3
    assert told == ["block 2 is damaged", "block 9 is damaged"]


def test_a_failure_of_another_process_is_told():
    ranks = TwoRanks(count=2, group=("block 9 is gone", None, None))
    with pytest.raises(TrainingError, match="process 1 of 2 cannot go on.*block 9 is gone"):
        next_share(ranks, Batches(batch_of(3)), print, [])
    with pytest.raises(StoreError, match="^mine$"):
        next_share(ranks, Batches(StoreError("mine")), print, [])


def test_a_signal_to_another_process_is_one_to_this_one():
    received = []
    ranks = TwoRanks(count=2, group=(None, OTHER, signal.SIGTERM))
    assert next_share(ranks, Batches(batch_of(3)), print, received) is None
    assert received == [signal.SIGTERM]


def test_after_a_signal_nothing_is_read():
    unread = Batches(StoreError("was read"))
    assert next_share(Ranks(), unread, print, [signal.SIGINT]) is None
    # one that comes while a batch is waited for
    received = []

    class Interrupted(Batches):
        def __next__(self):
            received.append(signal.SIGINT)
            raise WaitingEnded

    assert next_share(Ranks(), Interrupted(), print, received) is None


def test_after_the_last_batch_there_is_none():
    assert next_share(Ranks(), Batches(), print, []) is None


def test_empty_batches_are_passed_over_and_their_rows_counted():
    told = []
    empty = batch_of(0, left_out=4, damage=("block 2 is damaged",))
    batches = Batches(empty, batch_of(3, left_out=1, position=4), batch_of(4, position=8))
    feed = Feed(a_run(), batches, [], told.extend)
    share = feed.next()
    assert (share.batch.position, share.counts["rows"], share.left_out) == (4, 3, 5)
    assert told == ["block 2 is damaged"] and feed.wait_seconds == 0.25
    assert feed.next().left_out == 0


def test_an_epoch_of_empty_batches_is_an_error():
    empty = batch_of(0, left_out=4)
    feed = Feed(a_run(), Batches(empty, empty, batch_of(4), empty, empty, empty), [], print)
    assert feed.next().counts["rows"] == 4, "two of three batches are no epoch"
    with pytest.raises(StoreError, match=r"no row of cache\.zarr to train on can be read"):
        feed.next()


def test_a_wait_ends_with_a_signal():
    received, batches = [], Batches()
    Feed(a_run(), batches, received, print)
    assert not batches.stop_waiting()
    received.append(signal.SIGTERM)
    assert batches.stop_waiting()
