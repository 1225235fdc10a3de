"""The bits are pinned: another value would silently change every mask and row order."""

from __future__ import annotations

import numpy as np

from teacher_cache.random_bits import uniform_bits

MASK = 2**64 - 1


def split_mix(state: int) -> int:
    """SplitMix64's next output from this state, in plain integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_against_plain_integers_and_the_published_first_output() -> None:
    assert split_mix(0) == 0xE220A8397B1DCDAF  # first output of the reference generator seeded with 0
    for seed, row, view in ((0, 0, 0), (1, 2, 3), (2**63, 10**12, 7)):
        want = split_mix(split_mix(split_mix(seed) ^ split_mix(row)) ^ split_mix(view))
        assert int(uniform_bits(seed, row, view)) == want


def test_broadcasting_equals_single_calls_and_looks_uniform() -> None:
    rows, views = np.arange(1000)[:, None], np.arange(3)
    bits = uniform_bits(5, rows, views)
    assert bits.shape == (1000, 3)
    assert int(bits[17, 2]) == int(uniform_bits(5, 17, 2))
    assert len(np.unique(bits)) == 3000
    share = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(share - 0.5) < 0.005
