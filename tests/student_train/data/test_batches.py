"""Training batches from the path of a cache: those of `kdtrain`, from any position, for any number of processes."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train import TrainSettings, training_batches
from student_train.data.loader import TrainingBatch
from student_train.train.prepare import prepare_run
from teacher_cache import TargetRequest, open_caches
from teacher_cache.errors import SettingsError, StoreError, TargetsError

REQUEST = TargetRequest(hidden_layers=(4,))


def rows_of(batches: Any, count: int | None = None) -> list[tuple[int, ...]]:
    with batches:
        return [batch.row_ids for batch in islice(batches, count)]


def test_they_are_what_kdtrain_trains_on(tiny_parts: tuple[str, str], tmp_path: Path) -> None:
    settings = TrainSettings(
        method="hs", mapping="1:4", student="2x32", cache=tiny_parts, batch_size=12, seed=5, valid_share=0.1, steps=1,
        device="cpu", out=str(tmp_path / "student"),
    )  # fmt: skip
    run = prepare_run(settings)
    with (
        run.training_batches(0) as theirs,
        training_batches(tiny_parts, REQUEST, batch_size=12, seed=5, valid_share=0.1) as ours,
    ):
        for own, other in islice(zip(ours, theirs, strict=True), 14):  # more than an epoch
            assert (own.position, own.row_ids, own.counts) == (other.position, other.row_ids, other.counts)
            assert torch.equal(own.views["plain"].hidden[4], other.views["plain"].hidden[4])


def test_they_go_on_from_the_position_of_those_that_were_stopped(tiny_store: Path) -> None:
    whole = rows_of(training_batches(tiny_store, REQUEST, batch_size=7, epochs=2))
    assert sum(map(len, whole)) == 2 * 99
    with training_batches(tiny_store, REQUEST, batch_size=7) as batches:
        assert batches.position == 0
        begun = [batch.row_ids for batch in islice(batches, 9)]
        position = batches.position
    assert position == 63
    assert begun + rows_of(training_batches(tiny_store, REQUEST, batch_size=7, position=position, epochs=2)) == whole
    with training_batches(tiny_store, REQUEST, batch_size=7, epochs=2) as batches:
        assert len(list(batches)) == len(whole)
        assert batches.position == 198  # the last one was short


def test_processes_share_each_batch(tiny_store: Path) -> None:
    cache = open_caches(tiny_store)  # one that is open serves as well
    whole = rows_of(training_batches(cache, REQUEST, batch_size=8), 5)
    shares = [rows_of(training_batches(cache, REQUEST, batch_size=8, rank=rank, world_size=3), 5) for rank in range(3)]
    assert [sum(parts, ()) for parts in zip(*shares, strict=True)] == whole


def test_leaving_the_loop_ends_the_threads(tiny_store: Path) -> None:
    before = threading.active_count()
    with training_batches(tiny_store, REQUEST, batch_size=8) as batches:
        first: TrainingBatch = next(batches)
        assert len(first.row_ids) == 8 and threading.active_count() > before
    assert threading.active_count() == before
    assert list(batches) == []


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"batch_size": 0}, SettingsError, "batch_size 0"),
        ({"position": -1}, SettingsError, "position -1"),
        ({"rank": 2, "world_size": 2}, SettingsError, "rank 2 of world_size 2"),
        ({"valid_share": 0.999}, SettingsError, "no row is left"),
        ({"request": TargetRequest(hidden_layers=(9,))}, TargetsError, "lacks hidden 9"),
        ({"cache": "nothing.zarr"}, StoreError, "no store at 'nothing.zarr'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_batch(
    tiny_store: Path, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        training_batches(**{"cache": tiny_store, "request": REQUEST, "batch_size": 8, **options})
