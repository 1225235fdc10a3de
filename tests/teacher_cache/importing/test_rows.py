"""The order of imported rows, and how many ids are kept where places list unlike numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.errors import SettingsError
from teacher_cache.importing.files import Records
from teacher_cache.importing.known import KnownTeacher
from teacher_cache.importing.logprobs import LogprobSource
from teacher_cache.importing.rows import ImportedRows, SourceScan, choose_entries
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import write_jsonl, write_parquet

Asked = Callable[..., ImportSettings]
RECORDS = [
    {"input_ids": [number, 2, 3], "top_ids": [[4], [5]], "top_logprobs": [[-1.0], [-1.0]]} for number in range(60)
]


def ordered(asked: Asked, path: Path, **changes: object) -> ImportedRows:
    settings = asked(path, **changes)
    teacher = KnownTeacher.load(settings)
    return ImportedRows(LogprobSource(Records([path]), "columns", teacher.tokenizer), teacher, settings)


def test_lines_are_shuffled_and_a_prefix_stays_one(asked: Asked, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    rows = ordered(asked, path)
    assert sorted(rows.row_ids) == list(range(60)) and list(rows.row_ids) != list(range(60))
    assert ordered(asked, path, max_rows=20).row_ids.tolist() == rows.row_ids[:20].tolist()
    assert ordered(asked, path, seed=1).row_ids.tolist() != rows.row_ids.tolist()
    assert rows.read(0, 3).input_ids_T[0] == rows.row_ids[0]


def test_rows_of_a_group_stay_together(asked: Asked, tmp_path: Path) -> None:
    """A table is read group after group, so that none is decompressed for every row of it."""
    rows = ordered(asked, write_parquet(tmp_path / "a.parquet", RECORDS, group=10))
    groups = rows.row_ids // 10
    assert np.count_nonzero(np.diff(groups)) == 5 and sorted(set(groups)) == list(range(6))
    assert groups.tolist() != sorted(groups) and any(np.diff(rows.row_ids[:10]) < 0)


def scan(counts: dict[int, int]) -> SourceScan:
    return SourceScan(longest=9, tokens=90, cut=0, top_counts=Counter(counts), places=80, followed=70)


def test_as_many_ids_are_kept_as_most_places_list(asked: Asked) -> None:
    """Neither as many as the few that list one more, nor as few as the one that lacks some."""
    settings = asked(Path("a.jsonl"))
    assert choose_entries(settings, scan({20: 70, 21: 5, 3: 1}), 1024) == 20
    assert choose_entries(settings, scan({20: 7, 21: 7}), 1024) == 21
    assert choose_entries(asked(Path("a.jsonl"), k=5), scan({20: 70}), 1024) == 5
    with pytest.raises(SettingsError, match="--k 22 is more than the 21 ids"):
        choose_entries(asked(Path("a.jsonl"), k=22), scan({20: 70, 21: 5}), 1024)
