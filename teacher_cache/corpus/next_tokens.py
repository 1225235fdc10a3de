"""After which tokens of a row the distribution of the next one is kept: the places of a causal model's rows.

A position is a place if the token after it is real, belongs to the same segment, and is one to be learnt. Of a row's
places all are kept, or every N-th from the first on, or max(1, round(share * places)) of them: those with the smallest
hashes of (seed, row id, position). So a row's places are the same alone as among others, in any order, on any number of
workers.

Cost: a hash per position where a share is drawn. The result is stored, not derived again by readers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.positions import parse_positions, share_of, step_of
from teacher_cache.corpus.rows import RowBlock
from teacher_cache.random_bits import uniform_bits

# last coordinate of the hash, as in `masking.py` (0, 1, 2) and `codecs/sparse_logits.py` (3)
_KEPT = 4


def next_token_places(rows: RowBlock, *, positions: str, seed: int) -> NDArray[np.bool_]:
    """kept_BT: True at positions after which the next token's distribution is kept; `positions` as of `--positions`.

    Never more of a row than `places_per_row(positions, T)`; none where nothing follows that is to be learnt.

    Raises:
        SettingsError: `positions` is none.
    """
    positions = parse_positions(positions)
    place_BT = _places(rows)
    step, share = step_of(positions), share_of(positions)
    if step is not None:
        place_BT &= (np.cumsum(place_BT, axis=1) - 1) % step == 0
        return place_BT
    return place_BT if share is None else _drawn(place_BT, rows.row_id_B, share, seed)


def _places(rows: RowBlock) -> NDArray[np.bool_]:
    """Whether the next position holds a token that follows from the segment so far."""
    length = rows.input_ids_BT.shape[1]
    place_BT: NDArray[np.bool_] = np.arange(1, length + 1) < rows.length_B[:, None]
    if rows.starts_BT is not None:
        place_BT[:, :-1] &= ~rows.starts_BT[:, 1:]
    if rows.learnt_BT is not None:
        place_BT[:, :-1] &= rows.learnt_BT[:, 1:]
    return place_BT


def _drawn(place_BT: NDArray[np.bool_], row_id_B: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    bits_BT = uniform_bits(seed, row_id_B[:, None], 0, np.arange(place_BT.shape[1]), _KEPT)
    places_B = place_BT.sum(axis=1)
    count_B = np.minimum(np.maximum(1, np.rint(share * places_B)), places_B)
    # two keys, so that no value of the bits has to stand for "no place"
    order_BT = np.lexsort((bits_BT, ~place_BT), axis=1)
    kept_BT = np.zeros_like(place_BT)
    np.put_along_axis(kept_BT, order_BT, np.arange(place_BT.shape[1]) < count_B[:, None], axis=1)
    return kept_BT
