"""Do the arrays of a block say what they can say? Ids, lengths, places and counts against the manifest and each other.

Whoever makes a store can commit any numbers with right hashes. Those that address something (an id a row of an
embedding, a position a place in a row, an index a component) would end a training with an error from inside a kernel,
or be taken without a word. They are few beside the codes, on the host, and looked at once for each block that is read.
Codes themselves may be any numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.codecs.logits import SampleCodec, TopkCodec, id_planes
from teacher_cache.format.layout import DISTINCT, NEXT_KEPT, SEGMENT_STARTS, StoreLayout
from teacher_cache.format.row_bits import count_row_bits, pack_row_bits, unpack_row_bits

Arrays = Mapping[str, NDArray[Any]]

_SIGN, _MINUS_INFINITY, _ROUNDING = 0x8000, 0xFC00, 0x1000  # as bits of float16: the last is 2^-11


class ImpossibleError(ValueError):
    """An array holds what no build writes. `path` is the array."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(what)
        self.path = path


def check_entries(path: str, held: int, room: int) -> None:
    """Check how many entries of a ragged array are said to be there."""
    if not 0 <= held <= room:
        raise ImpossibleError(path, f"counts {held} entries, where there is room for {room}")


def check_values(layout: StoreLayout, block: int, arrays: Arrays) -> None:
    """Check what a block holds in one view. `arrays` are those loaded of it, as they are coded.

    Raises:
        ImpossibleError: a number cannot be what it says.
    """
    first, last = layout.manifest.block_range(block)
    rows = last - first
    if "input_ids" in arrays:
        _check_rows(layout, arrays, rows)
        _check_bits(layout, arrays, rows)
    if "input_ids" in arrays and "masked/positions" in arrays:
        _check_masks(layout, arrays, rows)
    if isinstance(layout.logits, TopkCodec) and "logits/log_tail" in arrays:
        _check_topk(layout.logits, arrays)
    if isinstance(layout.logits, SampleCodec) and DISTINCT in arrays:
        _check_draws(layout, layout.logits, arrays, rows)
    for stream in layout.streams:
        if f"{stream.path}/escapes/index" in arrays:
            _check_escapes(layout, stream.path, stream.width, arrays)
        if f"{stream.path}/sinks/index" in arrays:
            _check_sinks(layout, stream.path, arrays)
        if (scale := arrays.get(f"{stream.path}/scale")) is not None:
            _refuse(f"{stream.path}/scale", scale, ~(np.isfinite(scale) & (scale >= 0)), "a finite number from 0 on")


def _check_rows(layout: StoreLayout, arrays: Arrays, rows: int) -> None:
    manifest = layout.manifest
    _check_range(arrays, "input_ids", slice(rows), manifest.teacher.vocab_size, "an id of the teacher's vocabulary")
    _check_range(arrays, "length", slice(rows), manifest.seq_len + 1, "a number of tokens", lowest=1)
    _check_range(arrays, "row_id", slice(rows), max(manifest.corpus.rows, 1), "the number of a row of the text")


def _check_bits(layout: StoreLayout, arrays: Arrays, rows: int) -> None:
    """Segments begin at tokens, the first at the first; a position that is kept has a next token in its segment."""
    seq_len = layout.manifest.seq_len
    within_BT = np.arange(seq_len) < arrays["length"][:rows, None]
    ends_BT = ~np.pad(within_BT[:, 1:], ((0, 0), (0, 1)))
    if SEGMENT_STARTS in arrays:
        starts_BT = _row_bits(arrays, SEGMENT_STARTS, rows, seq_len)
        _refuse_bits(SEGMENT_STARTS, starts_BT & ~within_BT, "where a token is")
        _refuse_bits(SEGMENT_STARTS, ~starts_BT[:, :1], "at the first position of a row too")
        ends_BT = ends_BT | np.pad(starts_BT[:, 1:], ((0, 0), (0, 1)))
    if NEXT_KEPT in arrays:
        kept_BT, places = _row_bits(arrays, NEXT_KEPT, rows, seq_len), layout.manifest.places_of("plain")
        _refuse_bits(NEXT_KEPT, kept_BT & ends_BT, "where a next token of the same segment is")
        count_B = kept_BT.sum(axis=1)
        _refuse(NEXT_KEPT, count_B, count_B > places, f"at most {places} positions of a row")


def _row_bits(arrays: Arrays, path: str, rows: int, seq_len: int) -> NDArray[np.bool_]:
    bytes_BN = arrays[path][:rows]
    beyond_BN = pack_row_bits(np.ones((1, seq_len), dtype=np.bool_)) | bytes_BN
    _refuse(path, bytes_BN, beyond_BN != pack_row_bits(np.ones((1, seq_len), dtype=np.bool_)), "bits within the row")
    return unpack_row_bits(bytes_BN, seq_len)


def _refuse_bits(path: str, wrong_BT: NDArray[np.bool_], must_be: str) -> None:
    if wrong_BT.any():
        row, position = np.argwhere(wrong_BT)[0].tolist()
        raise ImpossibleError(
            path, f"marks position {position} of row {row} of the block wrongly: a mark must be {must_be}"
        )


def _check_masks(layout: StoreLayout, arrays: Arrays, rows: int) -> None:
    places, vocabulary = layout.manifest.masked_per_row, layout.manifest.teacher.vocab_size
    _check_range(arrays, "masked/count", slice(rows), places + 1, "a number of masked positions")
    real_BM = np.arange(places) < arrays["masked/count"][:rows, None]
    for name in ("original_ids", "replacement_ids"):
        _check_range(arrays, f"masked/{name}", slice(rows), vocabulary, "an id of the teacher's vocabulary")
    positions_BM = arrays["masked/positions"][:rows]
    length_B1 = arrays["length"][:rows, None]
    beyond_BM = (positions_BM < 0) | (positions_BM >= length_B1)
    _refuse("masked/positions", positions_BM, real_BM & beyond_BM, "a position within its row")
    falling_BM = positions_BM[:, 1:] <= positions_BM[:, :-1]
    _refuse("masked/positions", positions_BM[:, 1:], real_BM[:, 1:] & falling_BM, "above the one before it")
    # those of places that only fill up are never looked up
    stood_BM = np.take_along_axis(arrays["input_ids"][:rows], np.where(real_BM, positions_BM, 0), axis=1)
    original_BM = arrays["masked/original_ids"][:rows]
    _refuse("masked/original_ids", original_BM, real_BM & (original_BM != stood_BM), "the id that its row has there")


def _check_topk(codec: TopkCodec, arrays: Arrays) -> None:
    planes = [arrays[f"logits/ids/{plane}"] for plane in id_planes(codec.vocab_size)]
    _check_planes("logits/ids", planes, codec.vocab_size)
    halves = ("log_tail", "log_probs") if codec.log_probs == "float16" else ("log_tail",)
    for name in halves:
        values = arrays[f"logits/{name}"]
        bits = values.view(np.uint16)
        possible = (bits <= _ROUNDING) | ((bits >= _SIGN) & (bits <= _MINUS_INFINITY))
        _refuse(f"logits/{name}", values, ~possible, "the logarithm of a probability")


def _check_planes(path: str, planes: list[NDArray[np.uint8]], vocabulary: int) -> None:
    """Ids in planes of one byte: only where the highest is that of the last id can the others make it one too large."""
    *_, highest = planes
    shift = 8 * (len(planes) - 1)
    last = (vocabulary - 1) >> shift
    suspects = highest >= last
    if not suspects.any():
        return
    ids = sum(plane[suspects].astype(np.int64) << 8 * place for place, plane in enumerate(planes))
    assert isinstance(ids, np.ndarray)
    _refuse(path, ids, ids >= vocabulary, f"an id of the teacher's vocabulary, below {vocabulary}")


def check_distinct(codec: SampleCodec, distinct_P: NDArray[Any]) -> None:
    """Check how many different ids were drawn at each place."""
    _refuse(DISTINCT, distinct_P, distinct_P > codec.draws, f"at most {codec.draws}, the number of draws")


def _check_draws(layout: StoreLayout, codec: SampleCodec, arrays: Arrays, rows: int) -> None:
    distinct_P, counts_E = arrays[DISTINCT], arrays[layout.draw_paths["counts"]].astype(np.int64)
    spec = layout.manifest.targets.logits
    assert spec is not None
    places = layout.manifest.places_of(spec.view)
    check_distinct(codec, distinct_P)
    if "masked/count" in arrays or NEXT_KEPT in arrays:
        count_B = (
            arrays["masked/count"][:rows] if "masked/count" in arrays else count_row_bits(arrays[NEXT_KEPT][:rows])
        )
        real_P = np.zeros(len(distinct_P), dtype=np.bool_)
        real_P[: rows * places] = (np.arange(places) < count_B[:, None]).ravel()
        _refuse(DISTINCT, distinct_P, (distinct_P > 0) != real_P, "above 0 at places that are kept and 0 elsewhere")
    held_P = distinct_P[distinct_P > 0].astype(np.int64)
    if not len(held_P):
        return
    starts = np.cumsum(held_P) - held_P
    _refuse(layout.draw_paths["counts"], counts_E, counts_E < 1, "at least 1")
    drawn = np.add.reduceat(counts_E, starts)
    _refuse(layout.draw_paths["counts"], drawn, drawn != codec.draws, f"{codec.draws} together at each place")
    planes = [arrays[layout.draw_paths[f"ids/{plane}"]] for plane in id_planes(codec.vocab_size)]
    gaps_E = np.zeros(len(counts_E), dtype=np.int64)
    for place, plane in enumerate(planes):
        gaps_E += plane.astype(np.int64) << 8 * place
    largest = np.add.reduceat(gaps_E, starts)  # ids are kept as distances, so the last one is their sum
    _refuse(
        "logits/draws/ids", largest, largest >= codec.vocab_size, f"an id of the vocabulary, below {codec.vocab_size}"
    )


def _check_escapes(layout: StoreLayout, path: str, width: int, arrays: Arrays) -> None:
    index = arrays[f"{path}/escapes/index"]
    values = width * layout.manifest.block_rows * layout.manifest.seq_len
    _check_range(arrays, f"{path}/escapes/index", slice(None), values, "the place of a value of its view")
    _refuse(f"{path}/escapes/index", index[1:], index[1:] <= index[:-1], "above the one before it")


def _check_sinks(layout: StoreLayout, path: str, arrays: Arrays) -> None:
    index, values = arrays[f"{path}/sinks/index"], arrays[f"{path}/sinks/value"]
    tokens = layout.manifest.block_rows * layout.manifest.seq_len
    _check_range(arrays, f"{path}/sinks/index", slice(None), tokens, "the number of a token of its view")
    _refuse(f"{path}/sinks/index", index[1:], index[1:] <= index[:-1], "above the one before it")
    _refuse(f"{path}/sinks/value", values, ~np.isfinite(values), "a finite number")


def _check_range(arrays: Arrays, path: str, part: slice, stop: int, what: str, lowest: int = 0) -> None:
    values = arrays[path][part]
    # two passes without a copy; which numbers are wrong is worked out only where some are
    if values.size and (int(values.min()) < lowest or int(values.max()) >= stop):
        _refuse(path, values, (values < lowest) | (values >= stop), f"{what}, {lowest} to {stop - 1}")


def _refuse(path: str, values: NDArray[Any], wrong: NDArray[np.bool_], must_be: str) -> None:
    if wrong.any():
        raise ImpossibleError(path, f"holds {values[wrong].flat[0].item()!r}, which must be {must_be}")
