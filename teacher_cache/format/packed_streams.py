"""Codes of a calibrated stream as the arrays of one block: packed components, what exceeds their packing, and sinks.

Builds and derivations write these arrays through here alone. Each view is packed by itself and starts at an element of
its own, so that a reader can take one view out of a block. Codes come a range of tokens at a time, in any order, and
are packed at once: a block that is being filled takes no more memory than its bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.packing import Packing, pack_codes, ranges
from teacher_cache.contract.streams import VectorStream
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout


class Sinks(NamedTuple):
    """Some tokens of a stream that are kept as they are: ascending numbers in a block, its views one after another."""

    token_S: NDArray[np.int64]
    value_SD: NDArray[np.floating]


class StreamPacker:
    """The arrays of one block of a calibrated stream, filled by ranges of tokens; used by one thread at a time."""

    def __init__(self, layout: StoreLayout, stream: VectorStream) -> None:
        assert stream.calibration is not None
        self._stream, self._components = stream, stream.calibration.components
        self._per_view = layout.manifest.block_rows * layout.manifest.seq_len
        self._arrays: dict[str, NDArray[Any]] = {
            path: np.zeros(layout.arrays[path].block_shape, dtype=layout.arrays[path].dtype)
            for path in layout.arrays_in(stream.path)
        }
        for packing, _ in ranges(self._components):
            if packing.of_zeros:
                # as padding is coded, and what no token ever comes to
                self._array(f"codes/{packing.name}").fill(packing.of_zeros)
        views = len(self._array("escapes/count"))
        self._index: list[list[NDArray[np.int64]]] = [[] for _ in range(views)]
        self._value: list[list[NDArray[np.int16]]] = [[] for _ in range(views)]
        self._sinks: list[Sinks] = []

    def _array(self, name: str) -> NDArray[Any]:
        return self._arrays[f"{self._stream.path}/{name}"]

    def put(self, view: int, start: int, codes_DN: torch.Tensor) -> None:
        """Round and pack the codes of tokens `start`, … of a view, each token once. They are used up.

        Raises:
            TeacherError: a value is not finite, or is beyond any step that 16 bits can count.
        """
        tokens = codes_DN.shape[1]
        found = pack_codes(codes_DN, self._components, start)
        for packing, _ in ranges(self._components):
            self._put_packed(packing, view, start, tokens, found.packed[packing.name])
        component, token = np.divmod(found.escape_index, max(1, tokens))
        self._index[view].append(component * self._per_view + start + token)
        self._value[view].append(found.escape_value)

    def _put_packed(self, packing: Packing, view: int, start: int, tokens: int, elements_CL: NDArray[Any]) -> None:
        length = packing.length(self._per_view)
        first, last = start // packing.per_byte, packing.length(start + tokens)
        here_CL = self._array(f"codes/{packing.name}")[:, view * length + first : view * length + last]
        # what lies across the ends of a range has zeros where other ranges have tokens: digits add up
        shared = {0} if start % packing.per_byte else set[int]()
        if (start + tokens) % packing.per_byte and start + tokens < self._per_view:
            shared.add(last - first - 1)
        kept = {place: here_CL[:, place] - np.uint8(packing.of_zeros) for place in shared}
        here_CL[...] = elements_CL
        for place, others_C in kept.items():
            here_CL[:, place] += others_C

    def put_sinks(self, sinks: Sinks) -> None:
        """Keep tokens as they are; their codes are 0. Parts may come in any order."""
        self._sinks.append(sinks)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Every array of the stream. Call once.

        Raises:
            TeacherError: more values are beyond their packing, or more tokens are sinks, than there is room for.
        """
        for view, (indices, values) in enumerate(zip(self._index, self._value, strict=True)):
            if indices:
                self._put_escapes(view, np.concatenate(indices), np.concatenate(values))
        if self._sinks:
            _put_sinks(self._stream, self._arrays, self._per_view, self._sinks)
        return {**self._arrays}

    def _put_escapes(self, view: int, index_E: NDArray[np.int64], value_E: NDArray[np.int16]) -> None:
        found, room = len(index_E), self._array("escapes/index").shape[1]
        if found > room:
            raise TeacherError(
                f"{self._stream.path} has {found} values in one block beyond what calibration saw, room is for {room}: "
                "these rows are unlike the first ones of the corpus, and cut-off targets would ruin training; "
                "raise --max-rows if calibration had few rows, or use --precision int8, in another --out if blocks "
                "are written already"
            )
        order_E = np.argsort(index_E)
        self._array("escapes/count")[view] = found
        self._array("escapes/index")[view, :found] = index_E[order_E]
        self._array("escapes/value")[view, :found] = value_E[order_E]


def _put_sinks(stream: VectorStream, arrays: dict[str, NDArray[Any]], per_view: int, parts: list[Sinks]) -> None:
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
