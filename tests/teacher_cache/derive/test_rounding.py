"""What rounding again costs is foretold from codes alone, beside coordinates that only the test knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from teacher_cache.derive.rounding import CodedSample, measure_cells


def round_in_turn(values: NDArray[np.float64], steps: Sequence[float]) -> NDArray[np.float64]:
    for step in steps:
        values = np.rint(values / step) * step
    return values


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("steps", [(1.0,), (1.0, 1.7), (0.6, 1.0, 1.3)])
def test_the_error_of_one_more_rounding(draw: str, steps: tuple[float, ...]) -> None:
    spread_K = np.geomspace(30, 0.2, 24)  # from hundreds of steps to hardly one
    exact_NK = getattr(np.random.default_rng(0), draw)(size=(20_000, 24)) * spread_K
    coded_NK = round_in_turn(exact_NK, steps)
    step, lost = steps[-1], float(((exact_NK - coded_NK) ** 2).sum(axis=1).mean())
    sample = CodedSample(np.rint(coded_NK / step).astype(np.int16).T, steps)
    for ratio in (1.2, 1.6, 2.2, 4.0, 9.0):
        again_NK = round_in_turn(coded_NK, (ratio * step,))
        happens = float(((exact_NK - again_NK) ** 2).sum(axis=1).mean())
        assert lost + sample.added_error(ratio) * step**2 == pytest.approx(happens, rel=0.04), ratio
    power = float((exact_NK**2).sum(axis=1).mean())
    assert sample.power * step**2 + lost == pytest.approx(power, rel=0.01)


def test_cells_of_one_rounding_are_those_of_rounding() -> None:
    centre, width = measure_cells((0.3,), 5)
    assert np.allclose(centre, 0, atol=1e-9)
    assert np.allclose(width, 1, atol=0.01)


def test_cells_of_two_roundings_are_made_of_cells() -> None:
    """Steps 1 and 1.6: code 1 has the cell of 1 alone, code 2 those of 3, code 3 those of 4 and 5 and so on."""
    centre, width = measure_cells((1.0, 1.6), 3)
    codes = {code: [n for n in range(-9, 10) if round(n / 1.6) == code] for code in range(-3, 4)}
    assert np.allclose(centre + np.arange(-3, 4), [np.mean(cells) / 1.6 for cells in codes.values()])
    assert np.allclose(width, [len(cells) / 1.6 for cells in codes.values()], rtol=0.01)


def test_nothing_but_zeros_costs_nothing() -> None:
    sample = CodedSample(np.zeros((3, 50), dtype=np.int16), (1.0,))
    assert sample.power == sample.added_error(3.0) == 0
