"""A cache in a student's ids, and the counts of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.mapping import IdMapping
from student_train.students.vocabulary.source import TrimmedSource, count_ids
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import DamagedStoreError
from teacher_cache.read.pool import open_caches

EVERYTHING = TargetRequest(hidden_layers=(2,), attention_layers=(3,), logits=True, masked=True)


def test_counts_are_those_of_the_rows_before_masking(tiny_store: Path) -> None:
    reader = open_caches(tiny_store)
    rows = (range(3, 17), range(20, reader.rows))
    plain = np.zeros(200, dtype=np.int64)
    for row in [each for run in rows for each in run]:
        (targets,) = reader.read_rows(row, row + 1, TargetRequest()).values()
        for each in targets.input_ids_BT[0, : int(targets.length_B[0])].tolist():
            plain[each] += 1
    assert (count_ids(reader, rows) == plain).all()


def test_counts_of_several_stores_and_of_damaged_ones(tiny_parts: Any, make_tiny_store: Any, tmp_path: Path) -> None:
    pool = open_caches(tiny_parts)
    parts = [open_caches(part) for part in tiny_parts]
    whole = sum(count_ids(part, (range(part.rows),)) for part in parts)
    assert (count_ids(pool, (range(pool.rows),)) == whole).all()
    store = make_tiny_store(tmp_path / "cut.zarr", targets="logits", max_rows=24, block_rows=8)
    before = count_ids(open_caches(store), (range(8, 24),))
    shard = next(
        path for path in sorted((store / "input_ids").rglob("*")) if path.is_file() and path.parent.name == "0"
    )
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedStoreError):
        count_ids(open_caches(store), (range(24),))
    assert (count_ids(open_caches(store), (range(24),), skip_damaged=True) == before).all()


def test_what_it_gives_is_what_the_cache_gives_in_other_ids(tiny_store: Path) -> None:
    reader = open_caches(tiny_store)
    kept = KeptIds.of([*range(5), *range(5, 200, 2)], 200, 1)
    source = TrimmedSource(reader, kept)
    names = ("path", "manifest", "rows", "identity_sha256")
    assert [getattr(source, name) for name in names] == [getattr(reader, name) for name in names]
    assert source.teacher_folder() == reader.teacher_folder() and source.hidden_variance(2) == reader.hidden_variance(2)
    assert source.rotation(2) is reader.rotation(2)
    source.require(EVERYTHING)
    before = reader.read_rows(1, 6, EVERYTHING, masked_view=1)
    for view, targets in source.read_rows(1, 6, EVERYTHING, masked_view=1).items():
        expected = IdMapping(kept).batch(before[view])
        assert torch.equal(targets.input_ids_BT, expected.input_ids_BT)
        assert all(torch.equal(targets.hidden[layer], before[view].hidden[layer]) for layer in targets.hidden)
    assert not torch.equal(before["masked"].input_ids_BT, targets.input_ids_BT)
