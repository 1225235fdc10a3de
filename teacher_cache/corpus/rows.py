"""The rows of a corpus, read from the temporary file of token ids as they are asked for.

Cost: a block of rows at a time in memory; the ids stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.manifest import CorpusRecord
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.packing import RowSpans
from teacher_cache.corpus.tokens import Ids
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows: padded ids, real positions, stable row ids, and the first document in each row.

    `starts_BT` is True where a segment begins, as at position 0 of every row and at no padding; None of joined rows.
    `learnt_BT` is True at tokens that a model is to learn to say; None where that is all of them.
    """

    input_ids_BT: Ids
    length_B: NDArray[np.int32]
    row_id_B: NDArray[np.int64]
    document_B: NDArray[np.int64]
    starts_BT: NDArray[np.bool_] | None = None
    learnt_BT: NDArray[np.bool_] | None = None


class Rows:
    """The rows that are kept, in final order, read from the temporary file as they are asked for."""

    def __init__(
        self,
        *,
        record: CorpusRecord,
        frame: RowFrame,
        seq_len: int,
        tokens: Ids,
        spans: RowSpans,
        first_document: NDArray[np.int64],
        kept_rows: NDArray[np.int64],
        segment_starts: NDArray[np.int64] | None = None,
        learnt: NDArray[np.bool_] | None = None,
        first_row: int = 0,
        sources: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`segment_starts`, of isolated rows, says where among `tokens` segments begin, beside those of the rows.

        `learnt`, of conversations, says which of `tokens` are learnt.
        `first_row` says where in the final order the kept rows begin; `sources`, of a mix, how many rows of each are
        kept.
        """
        self.record = record
        self._frame, self._seq_len = frame, seq_len
        self._tokens, self._spans, self._first_document = tokens, spans, first_document
        self._kept_rows, self._segment_starts, self._learnt = kept_rows, segment_starts, learnt
        self.first_row = first_row
        self.sources = sources

    def part(self, number: int, parts: int) -> Rows:
        """The rows of part `number`, from 1, of `parts`: a contiguous share of the final order.

        Raises:
            SettingsError: there are fewer rows than parts.
        """
        start, stop = (len(self) * end // parts for end in (number - 1, number))
        if start == stop:
            raise SettingsError(
                f"--part {number}/{parts} holds no row: there are {len(self)} of them; give fewer parts"
            )
        return Rows(
            record=self.record,
            frame=self._frame,
            seq_len=self._seq_len,
            tokens=self._tokens,
            spans=self._spans,
            first_document=self._first_document,
            kept_rows=self._kept_rows[start:stop],
            segment_starts=self._segment_starts,
            learnt=self._learnt,
            first_row=self.first_row + start,
        )

    def __len__(self) -> int:
        return len(self._kept_rows)

    def read(self, start: int, stop: int) -> RowBlock:
        """Rows start..stop of the final order; T is `seq_len` for every row."""
        row_id_B = self._kept_rows[start:stop]
        frame, spans = self._frame, self._spans
        first_B, stop_B = spans.start_R[row_id_B], spans.stop_R[row_id_B]
        text_B = stop_B - first_B
        head_B = len(frame.prefix) * spans.prefixed_R[row_id_B]
        tail_B = len(frame.suffix) * spans.suffixed_R[row_id_B]
        input_ids_BT = np.full((len(row_id_B), self._seq_len), frame.padding, dtype=np.int32)
        offset_BT = np.arange(self._seq_len) - head_B[:, None]
        real_BT = (offset_BT >= 0) & (offset_BT < text_B[:, None])
        at = (first_B[:, None] + offset_BT)[real_BT]
        input_ids_BT[real_BT] = self._tokens[at]
        input_ids_BT[head_B > 0, : len(frame.prefix)] = frame.prefix
        after_text_B = head_B + text_B
        for place, token in enumerate(frame.suffix):
            row_B = np.flatnonzero(tail_B)
            input_ids_BT[row_B, after_text_B[row_B] + place] = token
        learnt_BT = None
        if self._learnt is not None:
            learnt_BT = np.zeros_like(real_BT)
            learnt_BT[real_BT] = self._learnt[at]
        return RowBlock(
            input_ids_BT=input_ids_BT,
            length_B=(after_text_B + tail_B).astype(np.int32),
            row_id_B=row_id_B,
            document_B=self._first_document[row_id_B],
            starts_BT=self._starts(first_B, stop_B, head_B),
            learnt_BT=learnt_BT,
        )

    def _starts(
        self, first_B: NDArray[np.int64], stop_B: NDArray[np.int64], head_B: NDArray[np.int64]
    ) -> NDArray[np.bool_] | None:
        if self._segment_starts is None:
            return None
        starts_BT = np.zeros((len(first_B), self._seq_len), dtype=bool)
        starts_BT[:, 0] = True
        low_B, high_B = (np.searchsorted(self._segment_starts, at_B) for at_B in (first_B + 1, stop_B))
        for row, (low, high) in enumerate(zip(low_B, high_B, strict=True)):
            starts_BT[row, self._segment_starts[low:high] - first_B[row] + head_B[row]] = True
        return starts_BT
