"""Random bits that depend on named coordinates alone.

Masks, row order and block order must come out the same in every library version, process and batch size. So they are
not drawn from a generator with a state but computed: the bits for (seed, row, view, position) are a hash of exactly
these numbers. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once per
coordinate; it passes the usual statistical tests and costs a few nanoseconds a value in numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform_bits(seed: int, *coordinates: ArrayLike) -> NDArray[np.uint64]:
    """64 uniform bits for each combination of coordinates: non-negative integers that broadcast like arrays."""
    bits = _mix(np.asarray(seed % 2**64, dtype=np.uint64))
    for coordinate in coordinates:
        bits = _mix(bits ^ _mix(np.asarray(coordinate).astype(np.uint64)))
    return bits


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        bits = bits + _GOLDEN_GAMMA
        bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
        bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
        return np.asarray(bits ^ (bits >> np.uint64(31)), dtype=np.uint64)
