"""Rows from a stream and the places where it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.contract.manifest import CorpusRecord
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.packing import RowSpans
from teacher_cache.corpus.rows import Rows
from teacher_cache.errors import SettingsError

STREAM = np.arange(10, 30, dtype=np.int32)
RECORD = CorpusRecord(specs=(), fingerprint="", documents=3, tokens=20, rows=4)


def make_rows(order: list[int], *, isolated: bool = True, chat: bool = True) -> Rows:
    return Rows(
        record=RECORD,
        frame=RowFrame(prefix=(1, 2), suffix=(3,), separator=4, ending=(3,), padding=0),
        seq_len=8,
        tokens=STREAM,
        spans=RowSpans(
            start_R=np.array([0, 5, 8, 16]),
            stop_R=np.array([5, 8, 16, 18]),
            prefixed_R=np.array([True, True, False, False]),
            suffixed_R=np.array([True, False, False, True]),
        ),
        first_document=np.array([0, 0, 1, 2]),
        kept_rows=np.array(order),
        segment_starts=np.array([0, 2, 8, 11, 15, 17]) if isolated else None,
        learnt=STREAM % 2 == 0 if chat else None,
    )


def test_each_row_has_what_its_span_says() -> None:
    block = make_rows([2, 0, 3, 1]).read(0, 4)
    assert block.input_ids_BT.tolist() == [
        [18, 19, 20, 21, 22, 23, 24, 25],
        [1, 2, 10, 11, 12, 13, 14, 3],
        [26, 27, 3, 0, 0, 0, 0, 0],
        [1, 2, 15, 16, 17, 0, 0, 0],
    ]
    assert block.length_B.tolist() == [8, 8, 3, 5]
    assert block.document_B.tolist() == [1, 0, 2, 0]
    assert block.starts_BT is not None
    assert [np.flatnonzero(row).tolist() for row in block.starts_BT] == [[0, 3, 7], [0, 4], [0, 1], [0]]
    assert block.learnt_BT is not None
    text = (block.input_ids_BT >= 10) & (block.input_ids_BT % 2 == 0)
    assert np.array_equal(block.learnt_BT, text)


def test_joined_rows_of_text_have_neither() -> None:
    block = make_rows([2, 0], isolated=False, chat=False).read(0, 2)
    assert (block.starts_BT, block.learnt_BT) == (None, None)


def test_parts_share_the_order() -> None:
    rows = make_rows([2, 0, 3, 1])
    parts = [rows.part(number, 3) for number in (1, 2, 3)]
    assert [part.first_row for part in parts] == [0, 1, 2]
    assert [one for part in parts for one in part.read(0, len(part)).row_id_B] == [2, 0, 3, 1]
    starts = [part.read(0, len(part)).starts_BT for part in parts]
    assert np.array_equal(np.concatenate([one for one in starts if one is not None]), rows.read(0, 4).starts_BT)
    with pytest.raises(SettingsError, match="--part 1/5 holds no row"):
        rows.part(1, 5)
