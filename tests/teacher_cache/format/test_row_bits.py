"""Bits of a row lie where plain numpy finds them."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.format.row_bits import count_row_bits, pack_row_bits, row_bytes, set_positions, unpack_row_bits


@pytest.mark.parametrize("seq_len", [1, 7, 8, 9, 64, 129])
def test_bits_come_back_and_those_beyond_the_row_are_0(seq_len: int) -> None:
    bits_BT = np.random.default_rng(seq_len).random((5, seq_len)) < 0.5
    packed = pack_row_bits(bits_BT)
    assert packed.shape == (5, row_bytes(seq_len)) and packed.dtype == np.uint8
    assert np.array_equal(unpack_row_bits(packed, seq_len), bits_BT)
    for row, want_T in zip(packed, bits_BT, strict=True):
        number = int.from_bytes(row.tobytes(), "little")
        assert [bool(number >> t & 1) for t in range(seq_len)] == want_T.tolist() and number >> seq_len == 0


def test_set_bits_are_counted_and_named_in_order() -> None:
    bits_BT = np.random.default_rng(3).random((6, 21)) < 0.4
    assert count_row_bits(pack_row_bits(bits_BT)).tolist() == bits_BT.sum(axis=1).tolist()
    for places in (int(bits_BT.sum(axis=1).max()), 21):
        positions_BM, real_BM = set_positions(bits_BT, places)
        for bits_T, positions_M, real_M in zip(bits_BT, positions_BM, real_BM, strict=True):
            assert positions_M[real_M].tolist() == [t for t in range(21) if bits_T[t]]
            assert not positions_M[~real_M].any()
