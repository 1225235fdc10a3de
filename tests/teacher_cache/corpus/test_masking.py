"""Masks: the definition, independence of company and order, and the shares of BERT's recipe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.corpus.masking import MaskedRows, mask_rows
from teacher_cache.random_bits import uniform_bits

SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
VOCABULARY = 200
NAMES = ("positions_BM", "original_ids_BM", "replacement_ids_BM", "count_B")


def make_rows(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `[CLS] words, some [SEP] among them, [SEP] padding`, their lengths and ids."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, VOCABULARY, (rows, length), dtype=np.int32)
    ids[draw.random(ids.shape) < 0.1] = 3
    lengths = draw.integers(2, length + 1, rows, dtype=np.int32)
    ids[:, 0] = 2
    ids[np.arange(rows), lengths - 1] = 3
    ids[np.arange(length) >= lengths[:, None]] = 0
    return ids, lengths, draw.permutation(10 * rows)[:rows].astype(np.int64)


def mask(ids, lengths, row_ids, *, places=None, probability=0.15, seed=7, view=0) -> MaskedRows:
    if places is None:
        places = max(1, round(probability * ids.shape[1]))
    return mask_rows(
        ids, lengths, row_ids, special_ids=SPECIAL, mask_id=MASK, vocab_size=VOCABULARY,
        places=places, probability=probability, seed=seed, view=view,
    )  # fmt: skip


def plain_positions(
    ids, length: int, row_id: int, *, probability: float, places: int, seed: int, view: int
) -> list[int]:
    """The definition: the maskable positions with the smallest hashes."""
    maskable = [at for at in range(length) if ids[at] not in SPECIAL]
    if not maskable:
        return []
    count = min(max(1, round(probability * len(maskable))), places)
    by_hash = sorted(maskable, key=lambda at: int(uniform_bits(seed, row_id, view, at, 0)))
    return sorted(by_hash[:count])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6), length=st.integers(2, 40), data_seed=st.integers(0, 99), view=st.integers(0, 3),
    probability=st.floats(0.01, 0.9), places=st.integers(1, 40), seed=st.integers(0, 2**63),
)  # fmt: skip
def test_rows_follow_the_definition(rows, length, data_seed, view, probability, places, seed) -> None:
    ids, lengths, row_ids = make_rows(rows, length, data_seed)
    masked = mask(ids, lengths, row_ids, places=places, probability=probability, seed=seed, view=view)
    applied = masked.apply(ids)
    for row in range(rows):
        expected = plain_positions(
            ids[row], lengths[row], row_ids[row], probability=probability, places=places, seed=seed, view=view
        )
        count = masked.count_B[row]
        assert masked.positions_BM[row, :count].tolist() == expected
        np.testing.assert_array_equal(masked.original_ids_BM[row, :count], ids[row, expected])
        np.testing.assert_array_equal(masked.replacement_ids_BM[row, :count], applied[row, expected])
        untouched = np.setdiff1d(np.arange(length), expected)
        np.testing.assert_array_equal(applied[row, untouched], ids[row, untouched])
        for name in NAMES[:3]:
            assert not getattr(masked, name)[row, count:].any()


def test_a_row_is_masked_the_same_alone_and_in_any_order() -> None:
    ids, lengths, row_ids = make_rows(20, 64)
    together = mask(ids, lengths, row_ids)
    shuffled = np.random.default_rng(1).permutation(20)
    moved = mask(ids[shuffled], lengths[shuffled], row_ids[shuffled])
    for name in NAMES:
        np.testing.assert_array_equal(getattr(moved, name), getattr(together, name)[shuffled])
    for row in range(20):
        alone = mask(ids[row : row + 1], lengths[row : row + 1], row_ids[row : row + 1])
        for name in NAMES:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[row])


def test_padding_a_row_further_changes_nothing() -> None:
    ids, lengths, row_ids = make_rows(8, 32)
    wider = np.pad(ids, ((0, 0), (0, 16)))
    for name in NAMES:
        np.testing.assert_array_equal(
            getattr(mask(wider, lengths, row_ids, places=5), name), getattr(mask(ids, lengths, row_ids, places=5), name)
        )


@pytest.mark.parametrize("change", [{"seed": 8}, {"view": 1}])
def test_seed_and_view_give_other_masks(change) -> None:
    ids, lengths, row_ids = make_rows(50, 64)
    first, second = mask(ids, lengths, row_ids), mask(ids, lengths, row_ids, **change)
    assert (first.positions_BM != second.positions_BM).any(axis=1).sum() > 30
    np.testing.assert_array_equal(first.count_B, second.count_B)


def test_rows_without_maskable_positions_get_no_mask() -> None:
    ids = np.array([[2, 3, 0, 0], [2, 9, 3, 0]], dtype=np.int32)
    masked = mask(ids, np.array([2, 3], dtype=np.int32), np.array([5, 6]), places=2)
    assert masked.count_B.tolist() == [0, 1]
    assert masked.positions_BM.tolist() == [[0, 0], [1, 0]]
    np.testing.assert_array_equal(masked.apply(ids)[0], ids[0])


def test_the_input_is_left_alone() -> None:
    ids, lengths, row_ids = make_rows(5, 32)
    before = ids.copy()
    mask(ids, lengths, row_ids).apply(ids)
    np.testing.assert_array_equal(ids, before)


def test_shares_of_mask_random_and_kept() -> None:
    """80/10/10 within four standard deviations of the binomial, replacements ordinary and over the whole vocabulary."""
    ids, lengths, row_ids = make_rows(4000, 128)
    masked = mask(ids, lengths, row_ids)
    real = np.arange(masked.positions_BM.shape[1]) < masked.count_B[:, None]
    replaced, original = masked.replacement_ids_BM[real], masked.original_ids_BM[real]
    count = len(replaced)
    shown = (replaced == MASK).sum()
    kept = (replaced == original).sum()
    # a random token equals its own in one of 195 cases
    for seen, share in (shown, 0.8), (kept, 0.1 + 0.1 / 195), (count - shown - kept, 0.1 - 0.1 / 195):
        assert abs(seen - share * count) < 4 * np.sqrt(count * share * (1 - share))
    others = replaced[(replaced != MASK) & (replaced != original)]
    assert set(others) == set(range(5, VOCABULARY))
    counts = np.bincount(others, minlength=VOCABULARY)[5:]
    expected = len(others) / 195
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 195 + 4 * np.sqrt(2 * 195)


def test_every_position_is_masked_equally_often() -> None:
    ids = np.full((20_000, 22), 50, dtype=np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    masked = mask(ids, np.full(20_000, 22, dtype=np.int32), np.arange(20_000))
    counts = np.bincount(masked.positions_BM.ravel(), minlength=22)
    assert counts[0] == counts[21] == 0
    expected = 20_000 * 3 / 20
    assert np.abs(counts[1:21] - expected).max() < 5 * np.sqrt(expected)
