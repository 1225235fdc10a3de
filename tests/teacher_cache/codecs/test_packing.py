"""Packed codes come back exactly, escapes included, for any range of tokens, as a plain loop has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from teacher_cache.codecs.packing import (
    LARGEST_CODE,
    PACKINGS,
    ZERO,
    PackedCodes,
    Packing,
    choose_packings,
    pack_codes,
    ranges,
)

COMPONENTS = {"wide": 1, "byte": 2, "pair": 3, "triple": 2, "five": 4, ZERO: 2}
RADIX = {"pair": (15, 2), "triple": (5, 3), "five": (3, 5)}


def random_codes(seed: int, tokens: int, escapes: float) -> NDArray[np.int16]:
    """Codes within the limits, but for a share of any 16-bit values."""
    generator = np.random.default_rng(seed)
    rows = []
    for packing in PACKINGS:
        rows += [generator.integers(-packing.limit, packing.limit + 1, tokens) for _ in range(COMPONENTS[packing.name])]
    rows += [np.zeros(tokens, dtype=np.int64)] * COMPONENTS[ZERO]
    codes = np.stack(rows)
    wild = generator.random(codes.shape) < escapes
    codes[wild] = generator.integers(-LARGEST_CODE, LARGEST_CODE + 1, int(wild.sum()))
    return codes.astype(np.int16)


def unpack_plainly(packed: PackedCodes, tokens: int) -> NDArray[np.int16]:
    """The documented layout, one value at a time."""
    codes = np.zeros((sum(COMPONENTS.values()), tokens), dtype=np.int16)
    component = 0
    for name, count in COMPONENTS.items():
        for row in range(count):
            for token in range(tokens):
                if name in RADIX:
                    radix, per_byte = RADIX[name]
                    byte = int(packed.packed[name][row, token // per_byte])
                    digit = byte // radix ** (per_byte - 1 - token % per_byte) % radix
                    codes[component, token] = digit - radix // 2
                elif name != ZERO:
                    codes[component, token] = packed.packed[name][row, token]
            component += 1
    for index, value in zip(packed.escape_index, packed.escape_value, strict=True):
        codes[index // tokens, index % tokens] = value
    return codes


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), escapes=st.sampled_from([0.0, 0.05, 0.9]))
def test_packing_loses_nothing(seed: int, tokens: int, escapes: float) -> None:
    codes = random_codes(seed, tokens, escapes)
    packed = pack_codes(torch.from_numpy(codes.copy()), COMPONENTS)
    assert np.array_equal(unpack_plainly(packed, tokens), codes)
    assert (np.diff(packed.escape_index) > 0).all()
    assert np.array_equal(codes.ravel()[packed.escape_index], packed.escape_value)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), step=st.floats(1e-6, 1e6), data=st.data())
def test_any_range_of_tokens_unpacks_as_a_slice(seed: int, tokens: int, step: float, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, tokens))
    codes = random_codes(seed, tokens, 0.1)
    packed = pack_codes(torch.from_numpy(codes.copy()), COMPONENTS)
    within = codes.copy()
    within.ravel()[packed.escape_index] = 0
    expected = within.astype(np.float32) * np.float32(step)
    for packing, part in ranges(COMPONENTS):
        assert packed.packed[packing.name].shape == (COMPONENTS[packing.name], packing.length(tokens))
        values = torch.full((COMPONENTS[packing.name], stop - start), torch.nan)
        packing.unpack(packed.packed[packing.name], start, stop, step, values)
        assert np.array_equal(values.numpy(), expected[part, start:stop])


def test_many_components_unpack_in_pieces() -> None:
    tokens = 2**16 + 1
    generator = np.random.default_rng(0)
    for packing in PACKINGS:
        codes = generator.integers(-packing.limit, packing.limit + 1, (11, tokens)).astype(np.int16)
        values = torch.empty((11, tokens - 4))
        packing.unpack(packing.pack(torch.from_numpy(codes)).numpy(), 4, tokens, 0.3, values)
        assert np.array_equal(values.numpy(), codes[:, 4:].astype(np.float32) * np.float32(0.3))


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_arithmetic_and_table_agree_with_division_on_every_byte(packing: Packing) -> None:
    packed = np.arange((2 * packing.limit + 1) ** packing.per_byte)[None]
    if packing.per_byte == 1:
        packed -= packing.limit
        expected = packed
    else:
        radix, per_byte = RADIX[packing.name]
        places = radix ** np.arange(per_byte - 1, -1, -1)
        expected = (packed[..., None] // places % radix - radix // 2).reshape(1, -1)
    packed = packed.astype(packing.dtype)
    assert np.array_equal(packing.digits(packed), expected)
    assert np.array_equal(packing.look_up(torch.from_numpy(packed)).numpy(), expected)


@pytest.mark.parametrize(
    "spread, name", [(0, "zero"), (0.3, "five"), (0.6, "triple"), (2, "pair"), (30, "byte"), (4000, "wide")]
)
def test_each_component_gets_the_packing_of_its_spread(spread: float, name: str) -> None:
    codes = np.random.default_rng(0).normal(0, spread, (4000, 8)).round().astype(np.int16)
    _, components = choose_packings(codes, 8)
    assert components[name] == 8


def weigh_all(codes_N: NDArray[np.int16]) -> str:
    """The packing that takes fewest bits, all of them weighed byte by byte; of equal ones the narrowest."""
    costs = {}
    for packing in PACKINGS:
        beyond_N = np.abs(codes_N) > packing.limit
        packed = packing.pack(torch.from_numpy(np.where(beyond_N, 0, codes_N)[None])).numpy()[0]
        bits = 0.0
        for plane in packed.view(np.uint8).reshape(len(packed), -1).T:
            shares = np.unique(plane, return_counts=True)[1] / len(plane)
            bits += max(1.0, float(-(shares * np.log2(shares)).sum())) if len(shares) > 1 else 0.0
        costs[packing.name] = bits / packing.per_byte + 32 * beyond_N.mean()
    limits = {packing.name: packing.limit for packing in PACKINGS}
    costs[ZERO], limits[ZERO] = 32 * float((codes_N != 0).mean()), 0
    possible = {name: cost for name, cost in costs.items() if (np.abs(codes_N) > limits[name]).mean() <= 1 / 200}
    return min(reversed(list(possible)), key=lambda name: possible[name])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(30, 3000), draw=st.sampled_from(["normal", "laplace", "uniform"]))
def test_packings_that_are_not_weighed_would_not_have_been_chosen(seed: int, tokens: int, draw: str) -> None:
    generator = np.random.default_rng(seed)
    spread, values = 10.0 ** generator.uniform(-1.5, 3), {"low": -1.7, "high": 1.7} if draw == "uniform" else {}
    codes = (getattr(generator, draw)(size=(tokens, 1), **values) * spread).round().clip(-30000, 30000).astype(np.int16)
    if generator.random() < 0.3:
        codes[generator.integers(tokens)] = generator.integers(-30000, 30000)
    _, components = choose_packings(codes, 1)
    assert [name for name, count in components.items() if count] == [weigh_all(codes[:, 0])]


def test_rare_values_do_not_decide_the_packing_and_come_back() -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (8000, 16)).astype(np.int16)
    codes[17, 3] = 30000
    order, components = choose_packings(codes, 8)
    assert components["five"] == 16
    packed = pack_codes(torch.from_numpy(codes.T[order].copy()), components)
    assert packed.escape_value.tolist() == [30000]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 50))
def test_packings_hold_whole_groups_and_sort_by_spread(seed: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.normal(0, 10.0 ** generator.uniform(-2, 3, width), (500, width)).round().astype(np.int16)
    order, components = choose_packings(codes, 8)
    assert sorted(order) == list(range(width))
    assert list(components) == [*(packing.name for packing in PACKINGS), ZERO]
    assert sum(components.values()) == width
    if width % 8 == 0:
        assert all(count % 8 == 0 for count in components.values())
    packed = pack_codes(torch.from_numpy(codes.T[order].copy()), components)
    assert len(packed.escape_index) <= 0.005 * codes.size
