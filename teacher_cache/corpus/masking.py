"""The masked view of a row: which positions the teacher must guess, and what stands there instead.

Masking as in BERT (Devlin et al. 2019, section 3.1): of a row's maskable positions, those that are real and hold no
special token, max(1, round(probability * maskable)) are chosen; 80% of them show the mask token, 10% a random ordinary
token, 10% keep their own. All of it is a function of (seed, row id, view) and the row itself: a row is masked the same
alone as among others, in any order, on any number of workers.

Cost: a few hashes per position, in numpy. The result is stored, not derived again by readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.random_bits import uniform_bits

Ids = NDArray[np.int32]

MASK_SHARE = 0.8
RANDOM_SHARE = 0.1

# last coordinate of the hash: three independent draws at every position
_CHOICE, _ACTION, _REPLACEMENT = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class MaskedRows:
    """Masked positions of B rows: the first `count_B` of M places are real and ascending, the others hold zeros."""

    positions_BM: Ids
    original_ids_BM: Ids
    replacement_ids_BM: Ids
    count_B: Ids

    def apply(self, input_ids_BT: Ids) -> Ids:
        """The rows with the replacements in place: what the teacher reads."""
        masked_BT = input_ids_BT.copy()
        row, place = np.nonzero(np.arange(self.positions_BM.shape[1]) < self.count_B[:, None])
        masked_BT[row, self.positions_BM[row, place]] = self.replacement_ids_BM[row, place]
        return masked_BT


def mask_rows(
    input_ids_BT: Ids,
    length_B: Ids,
    row_id_B: NDArray[np.int64],
    *,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    places: int,
    probability: float,
    seed: int,
    view: int,
) -> MaskedRows:
    """Mask rows as the `view`-th masked view of them (from 0). At most `places` (M) positions of a row are masked.

    Random replacements are ids below `vocab_size` that are not in `special_ids`.
    """
    coordinates = (row_id_B[:, None], view, np.arange(input_ids_BT.shape[1]))
    maskable_BT = (coordinates[2] < length_B[:, None]) & ~np.isin(input_ids_BT, special_ids)
    positions_BM, count_B = _choose(maskable_BT, uniform_bits(seed, *coordinates, _CHOICE), probability, places)
    at_BM = (row_id_B[:, None], view, positions_BM)
    original_ids_BM = np.take_along_axis(input_ids_BT, positions_BM, axis=1)
    action_BM = _unit_interval(uniform_bits(seed, *at_BM, _ACTION))
    random_ids_BM = _ordinary_ids(uniform_bits(seed, *at_BM, _REPLACEMENT), special_ids, vocab_size)
    kept_or_random_BM = np.where(action_BM < MASK_SHARE + RANDOM_SHARE, random_ids_BM, original_ids_BM)
    replacement_ids_BM = np.where(action_BM < MASK_SHARE, mask_id, kept_or_random_BM)
    real_BM = np.arange(places) < count_B[:, None]
    return MaskedRows(
        positions_BM=np.where(real_BM, positions_BM, 0).astype(np.int32),
        original_ids_BM=np.where(real_BM, original_ids_BM, 0).astype(np.int32),
        replacement_ids_BM=np.where(real_BM, replacement_ids_BM, 0).astype(np.int32),
        count_B=count_B,
    )


def _choose(
    maskable_BT: NDArray[np.bool_], bits_BT: NDArray[np.uint64], probability: float, places: int
) -> tuple[NDArray[np.int64], Ids]:
    """Positions with the smallest bits among the maskable ones, ascending (places not needed last), and how many."""
    rows, length = maskable_BT.shape
    maskable_B = maskable_BT.sum(axis=1)
    wanted_B = np.maximum(1, np.rint(probability * maskable_B))
    count_B = np.minimum(np.minimum(wanted_B, maskable_B), places)
    # two keys, so that no value of the bits has to stand for "not maskable"
    order_BT = np.lexsort((bits_BT, ~maskable_BT), axis=1)
    chosen_BM = np.zeros((rows, places), dtype=np.int64)
    chosen_BM[:, :length] = order_BT[:, :places]
    chosen_BM[np.arange(places) >= count_B[:, None]] = length
    return np.minimum(np.sort(chosen_BM, axis=1), length - 1), count_B.astype(np.int32)


def _unit_interval(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _ordinary_ids(bits: NDArray[np.uint64], special_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    """Uniform ids below `vocab_size`, the special ones left out."""
    special = sorted({token for token in special_ids if 0 <= token < vocab_size})
    ids = (bits % np.uint64(vocab_size - len(special))).astype(np.int64)
    for token in special:
        ids += ids >= token
    return ids
