"""Codes of a calibrated stream as the arrays of one block: packed components, what exceeds their packing, and sinks.

Builds and derivations write these arrays through here alone. Each view is packed by itself and starts at an element of
its own, so that a reader can take one view out of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.codecs.packing import pack_codes
from teacher_cache.contract.streams import VectorStream
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout


class Sinks(NamedTuple):
    """Some tokens of a stream that are kept as they are: ascending numbers in a block, its views one after another."""

    token_S: NDArray[np.int64]
    value_SD: NDArray[np.floating]


def pack_stream(
    layout: StoreLayout, stream: VectorStream, codes_DN: NDArray[np.int16], sinks: Iterable[Sinks] = ()
) -> dict[str, NDArray[np.generic]]:
    """The arrays of one block of a calibrated stream from its codes, those of each view after those of another.

    `sinks` are parts in any order; their codes are 0.

    Raises:
        TeacherError: more values are beyond their packing, or more tokens are sinks, than there is room for.
    """
    assert stream.calibration is not None
    arrays: dict[str, NDArray[Any]] = {
        path: np.zeros(layout.arrays[path].block_shape, dtype=layout.arrays[path].dtype)
        for path in layout.arrays_in(stream.path)
    }
    count_W, index_WE, value_WE = (arrays[f"{stream.path}/escapes/{name}"] for name in ("count", "index", "value"))
    room = index_WE.shape[1]
    for view, codes in enumerate(np.split(codes_DN, len(count_W), axis=1)):
        packed = pack_codes(codes, stream.calibration.components)
        found = len(packed.escape_index)
        if found > room:
            raise TeacherError(
                f"{stream.path} has {found} values in one block beyond what calibration saw, room is for {room}: "
                "these rows are unlike the first ones of the corpus, and cut-off targets would ruin training; "
                "raise --max-rows if calibration had few rows, or use --precision int8, in another --out if blocks "
                "are written already"
            )
        for name, values in packed.packed.items():
            target = arrays[f"{stream.path}/codes/{name}"]
            target[:, view * values.shape[1] : (view + 1) * values.shape[1]] = values
        count_W[view] = found
        index_WE[view, :found] = packed.escape_index
        value_WE[view, :found] = packed.escape_value
    if stream.calibration.sinks is not None:
        _put_sinks(stream, arrays, codes_DN.shape[1] // len(count_W), [*sinks])
    return arrays


def _put_sinks(stream: VectorStream, arrays: dict[str, NDArray[Any]], per_view: int, parts: list[Sinks]) -> None:
    if not parts:
        return
    count_W, index_WS, value_WSD = (arrays[f"{stream.path}/sinks/{name}"] for name in ("count", "index", "value"))
    token_S, value_SD = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(token_S)
    view_S, within_S = np.divmod(token_S[order], per_view)
    for view, room in enumerate(map(len, index_WS)):
        here = view_S == view
        found = int(here.sum())
        if found > room:
            assert stream.calibration is not None and stream.calibration.sinks is not None
            raise TeacherError(
                f"{stream.path} has {found} tokens in one block that are far from all others, room is for {room}: "
                f"{stream.calibration.sinks.share:.2%} of the calibration sample were, so these rows are unlike the "
                "first ones of the corpus, and could not all be kept; raise --max-rows if calibration had few rows, or "
                "use --precision int8, in another --out if blocks are written already"
            )
        count_W[view] = found
        index_WS[view, :found] = within_S[here]
        value_WSD[view, :found] = value_SD[order][here]
