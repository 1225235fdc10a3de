"""Where rows begin and end in the stream of all documents' token ids.

`joined` and `document` rows are the stream cut at given places, each with the frame's prefix and suffix around it.
`isolated` rows are cut from a stream in which every document has its own prefix and ending, so that a document in the
middle of a row reads as if it stood alone. A row that begins in the middle of a document gets the prefix before it; one
that ends there gets the suffix, for which room is left. What would stand in a row without its text, a prefix at the end
of a row or an ending at the beginning of one, is left out: such a row is a few positions short, and a document whose
text ends with its row has no ending.

Documents that are `whole` (conversations) have all around them already, and are cut only where they are longer than a
row: one that does not fit into the rest of a row begins the next, and what a longer one leaves does as well.

Cost: a step of Python per isolated row, about a microsecond; 18 bytes a row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teacher_cache.corpus.frame import RowFrame


@dataclass(frozen=True, kw_only=True)
class RowSpans:
    """R rows: where each begins and ends in the stream, and whether the frame's prefix and suffix stand around it."""

    start_R: NDArray[np.int64]
    stop_R: NDArray[np.int64]
    prefixed_R: NDArray[np.bool_]
    suffixed_R: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start_R)


def cut_at(starts: NDArray[np.integer], tokens: int, *, framed: bool) -> RowSpans:
    """Rows that begin at `starts` and end where the next one begins, all with prefix and suffix, or none."""
    bounds = np.append(starts, tokens).astype(np.int64)
    around = np.full(len(starts), framed)
    return RowSpans(start_R=bounds[:-1], stop_R=bounds[1:], prefixed_R=around, suffixed_R=around)


def cut_isolated(
    document_starts: NDArray[np.int64], tokens: int, *, frame: RowFrame, seq_len: int, whole: Sequence[int] | None
) -> RowSpans:
    """Rows of a stream of documents that have their prefix and ending; `whole` has a 1 for each that is cut last.

    `document_starts` says where each document's prefix stands. `seq_len` is more than prefix and suffix together.
    """
    begins = array("q", document_starts.astype(np.int64).tobytes())
    begins.append(tokens)
    prefix, suffix, ending = len(frame.prefix), len(frame.suffix), len(frame.ending)
    starts, stops, prefixed, suffixed = array("q"), array("q"), bytearray(), bytearray()
    at, document = 0, 0
    while at < tokens:
        inside = at > begins[document]
        stop = following = at + seq_len - (prefix if inside else 0)
        cut = False
        last = bisect_right(begins, stop, lo=document) - 1
        if stop >= tokens:
            stop = following = tokens
        elif stop > begins[last]:
            begin, text_stop = begins[last], begins[last + 1] - ending
            if whole is not None and whole[last]:
                if begin > at:
                    stop = following = begin
            elif stop - suffix <= begin + prefix and begin > at:
                stop = following = begin
            elif not suffix and stop >= text_stop:
                stop, following = text_stop, begins[last + 1]
            else:
                stop -= suffix
                following, cut = stop, True
        starts.append(at)
        stops.append(stop)
        prefixed.append(inside)
        suffixed.append(cut)
        at = following
        document = bisect_right(begins, at, lo=document) - 1
    return RowSpans(
        start_R=np.array(starts, dtype=np.int64),
        stop_R=np.array(stops, dtype=np.int64),
        prefixed_R=np.array(prefixed, dtype=bool),
        suffixed_R=np.array(suffixed, dtype=bool),
    )
