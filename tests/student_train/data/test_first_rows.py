"""The rows that are read before a training: the first ones of every store, past damaged blocks where that is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.data.first_rows import FirstRows
from student_train.settings import TrainSettings
from student_train.train.prepare import prepare_run
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import DamagedStoreError
from teacher_cache.read.pool import open_caches

REQUEST = TargetRequest(hidden_layers=(2,))


@pytest.fixture
def damaged(tiny_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a store of 13 blocks of 8 rows, some of which have lost a byte of every array."""

    def damage(*blocks: int) -> Path:
        store = Path(shutil.copytree(tiny_store, tmp_path / "cache.zarr"))
        arrays = [folder for folder in store.rglob("c") if (folder / "12").exists()]
        assert len(arrays) > 10
        for shard in (path for folder in arrays for block in blocks for path in (folder / str(block)).rglob("0")):
            if shard.is_file():
                shard.write_bytes(shard.read_bytes()[:-1])
        return store

    return damage


def test_every_store_gives_its_share(tiny_parts: tuple[str, str]) -> None:
    reader = open_caches(tiny_parts)
    first_rows = FirstRows(source=reader, rows=(range(10, 60), range(101, 111)))
    wanted = [reader.read_rows(*bounds, REQUEST)["plain"].hidden[2] for bounds in ((10, 15), (101, 102))]
    assert torch.equal(first_rows.read(REQUEST, 6)["plain"].hidden[2], torch.cat(wanted))
    found = [batch["plain"].hidden[2] for batch in first_rows.batches(REQUEST, 6, 2)]
    assert [len(each) for each in found] == [2, 2, 1, 1]
    assert torch.equal(torch.cat(found), torch.cat(wanted))
    assert len(first_rows.read(REQUEST, 1000)["plain"].length_B) == 60


def test_damaged_blocks_end_it_or_are_passed_over(tiny_store: Path, damaged: Callable[..., Path]) -> None:
    reader, rows = open_caches([str(damaged(0, 2))]), (range(4, 80),)
    with pytest.raises(DamagedStoreError, match="block 0 of .*damaged"):
        FirstRows(source=reader, rows=rows).read(REQUEST, 5)
    whole = open_caches([str(tiny_store)])
    wanted = torch.cat([whole.read_rows(*bounds, REQUEST)["plain"].hidden[2] for bounds in ((8, 16), (24, 29))])
    for at_a_time in (3, 13, 50):
        first_rows = FirstRows(source=reader, rows=rows, skip_damaged=True)
        found = [batch["plain"].hidden[2] for batch in first_rows.batches(REQUEST, 13, at_a_time)]
        assert torch.equal(torch.cat(found), wanted)
        assert max(map(len, found)) <= at_a_time


def test_nothing_left_to_read_is_said(damaged: Callable[..., Path]) -> None:
    reader = open_caches([str(damaged(0, 1))])
    with pytest.raises(DamagedStoreError, match="block 0 of .*damaged"):
        FirstRows(source=reader, rows=(range(16),), skip_damaged=True).read(REQUEST, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "hs", "init": "random"},
        {"method": "mha", "student": "2x16:4"},
        {"method": "direct"},
    ],
    ids=["maps that are fitted", "a student that is sliced", "vectors whose variance is measured"],
)
def test_a_training_is_prepared_past_a_damaged_first_block(
    damaged: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {"cache": (str(damaged(0)),), "steps": 1, "device": "cpu", "out": str(tmp_path / "student"), **settings}
    with pytest.raises(DamagedStoreError, match="block 0 of .*damaged"):
        prepare_run(TrainSettings(**given))
    run = prepare_run(TrainSettings(**given, on_bad_block="skip"))
    assert run.maps_fitted == ("init" in settings)
    assert ("sliced" in run.built.description) == ("student" in settings)
    for view, targets in run.stand_in.items():
        wanted = run.reader.read_rows(8, 10, run.objective.request)[view]
        assert torch.equal(targets.input_ids_BT, wanted.input_ids_BT)
