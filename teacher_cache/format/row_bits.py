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


def unpack_row_bits(bytes_BN: NDArray[np.uint8], seq_len: int) -> NDArray[np.bool_]:
    """[B, ceil(T / 8)] -> [B, T], T being `seq_len`."""
    return np.unpackbits(bytes_BN, axis=1, count=seq_len, bitorder="little").astype(np.bool_)
