"""Codes of a calibrated stream as the arrays of one block: packed components, and what exceeds their packing.

Builds and derivations write these arrays through here alone. Each view is packed by itself and starts at an element of
its own, so that a reader can take one view out of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.codecs.packing import pack_codes
from teacher_cache.contract.streams import VectorStream
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout


def pack_stream(
    layout: StoreLayout, stream: VectorStream, codes_DN: NDArray[np.int16]
) -> dict[str, NDArray[np.generic]]:
    """The arrays of one block of a calibrated stream from its codes, those of each view after those of another.

    Raises:
        TeacherError: more values are beyond their packing than there is room for.
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
    return arrays
