"""What is extrapolated from a sample, and when a build is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.build.forecast import Forecast, MeasuredSample, forecast, refuse_without_room
from teacher_cache.errors import SpaceError
from teacher_cache.format.groups import read_groups
from teacher_cache.storage.local import LocalStorage


def made_of(small_store: Path, missing: list[int], rows: int, blocks: int, empty: int, per_row: int) -> Forecast:
    """The forecast where each array takes so many bytes for an empty block and each row."""
    (group,) = read_groups(LocalStorage(small_store))
    sample = MeasuredSample(
        rows=rows,
        blocks=blocks,
        bytes_per_array=dict.fromkeys(group.arrays, blocks * empty + rows * per_row),
        empty_bytes=dict.fromkeys(group.arrays, empty) if empty else {},
        seconds=2.0,
    )
    return forecast(group, missing, sample)


@pytest.mark.parametrize("rows, blocks", [(16, 1), (5, 1), (40, 3), (24, 2)])
def test_rows_and_blocks_are_counted_apart(small_store: Path, rows: int, blocks: int) -> None:
    found = made_of(small_store, [0, 1, 2], rows, blocks, empty=100, per_row=7)
    assert found.rows == 40 and found.blocks == 3 and found.tokens == 40 * 24
    assert set(found.bytes_per_array.values()) == {3 * 100 + 40 * 7}
    assert found.seconds == pytest.approx(2.0 * 40 / rows)


def test_without_an_empty_block_bytes_go_by_rows(small_store: Path) -> None:
    found = made_of(small_store, [1, 2], 16, 1, empty=0, per_row=7)
    assert found.rows == 24
    assert set(found.bytes_per_array.values()) == {24 * 7}


def test_every_byte_belongs_to_a_target(small_store: Path) -> None:
    found = made_of(small_store, [0], 16, 1, empty=0, per_row=1)
    targets = found.bytes_per_target()
    assert list(targets) == ["inputs", "logits", "hidden 2", "hidden 4", "attention 3"]
    assert sum(targets.values()) == found.total_bytes > 0
    assert targets["attention 3"] == 0, "it shares hidden state 2"
    assert all(targets[name] for name in ("inputs", "logits", "hidden 2", "hidden 4"))


def test_nothing_missing_is_nothing_to_write(small_store: Path) -> None:
    (group,) = read_groups(LocalStorage(small_store))
    found = forecast(group, [], MeasuredSample(rows=0, blocks=0, bytes_per_array={}, empty_bytes={}, seconds=0.0))
    assert (found.total_bytes, found.rows, found.seconds) == (0, 0, 0.0)


def test_one_line_says_size_room_and_time(small_store: Path) -> None:
    found = replace(made_of(small_store, [0, 1, 2], 40, 3, empty=0, per_row=100), seconds=7200.0)
    text = found.describe(5_000_000_000)
    assert "for 40 rows" in text and "5.0 GB free" in text and "about 2 h 0 min" in text
    assert "free space unknown" in found.describe(None)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache.zarr")
    free = storage.free_bytes()
    assert free is not None
    refuse_without_room(storage, 0)
    with pytest.raises(SpaceError, match=r"needs about 100000\.\d TB more.*coarser --precision.*--force"):
        refuse_without_room(storage, 10**17)
