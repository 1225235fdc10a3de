"""One bit a position of a row: where segments begin, after which positions the distribution is kept.

Position t is bit t % 8 of byte t // 8, the lowest first, so that plain numpy reads it: `np.unpackbits(...,
bitorder="little")`. Bits beyond the row are 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def row_bytes(seq_len: int) -> int:
    """Bytes that the bits of a row of so many positions take."""
    return -(-seq_len // 8)


def pack_row_bits(bits_BT: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """[B, T] -> [B, ceil(T / 8)]."""
    return np.packbits(bits_BT, axis=1, bitorder="little")


def count_row_bits(bytes_BN: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many bits of each row are set [B]."""
    return np.asarray(np.bitwise_count(bytes_BN).sum(axis=1, dtype=np.int64))


def set_positions(bits_BT: NDArray[np.bool_], places: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The positions of a row's set bits [B, M], ascending, 0 behind them; and which of the M are real."""
    real_BM = np.arange(places) < bits_BT.sum(axis=1)[:, None]
    return np.where(real_BM, np.argsort(~bits_BT, axis=1, kind="stable")[:, :places], 0), real_BM


def unpack_row_bits(bytes_BN: NDArray[np.uint8], seq_len: int) -> NDArray[np.bool_]:
    """[B, ceil(T / 8)] -> [B, T], T being `seq_len`."""
    return np.unpackbits(bytes_BN, axis=1, count=seq_len, bitorder="little").astype(np.bool_)
