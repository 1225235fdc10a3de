"""The error that codes have after they are rounded once more, to a larger step, estimated without the first values.

Two errors of rounding simply add up if they are independent. They are not, for two reasons. A *cell* is the range of
values that one code stands for. Small values are more frequent than large ones within a cell too, so that a coordinate
is smaller than its code on average. And after two roundings, of which the second step is 1.6 times the first, codes do
not lie in the middle of their cells. Both are estimated here from the codes alone: where the cells lie follows from the
steps that were taken, and the density within a cell is taken to fall as steeply as it does from cell to cell. Measured
on a BERT of 6 layers, the error after rounding again was within 4% of the one that follows, also after three times;
taken as a plain sum it was 17% larger at worst.

Pure functions of numpy arrays. Shapes: N tokens, K components, C codes from the lowest to the highest. Unit
of all lengths: the step of the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_POINTS = 16
"""Points for each of the smallest steps, on which cells are measured."""
_FLAT = 1e-3  # slopes below would lose digits; they move a coordinate by less than 1/3000 of a cell


class CodedSample:
    """Codes [K, N] of a sample of tokens, in the last one of `steps`; the others were rounded to before, in order.

    What rounding adds depends on a code alone, and on how far from it the coordinates of its component are on average.
    So a step is tried on the codes that there are, in place of on every token.
    """

    def __init__(self, codes_KN: NDArray[np.int16], steps: Sequence[float]) -> None:
        self.codes_KN = codes_KN
        self.largest = int(np.abs(codes_KN).max(initial=1))
        centre, width = measure_cells(steps, self.largest + 1)
        self._code_C = np.arange(-self.largest, self.largest + 1)
        self._count_C = np.zeros(len(self._code_C))
        self._offset_C = np.zeros(len(self._code_C))
        """Of each code, the sum over its tokens of how far from it a coordinate is on average."""
        for codes_N in codes_KN:
            # one more at each end, as the cells have it
            count_C = np.bincount(codes_N.astype(np.int64) + (self.largest + 1), minlength=len(centre))
            self._count_C += count_C[1:-1]
            self._offset_C += count_C[1:-1] * _mean_offsets(count_C, centre, width)

    @property
    def power(self) -> float:
        """E||z||^2 of the coordinates, without what their spread within cells adds."""
        return self._mean(self._code_C)

    def added_error(self, ratio: float) -> float:
        """By how much E||z - z'||^2 grows where codes are rounded to multiples of `ratio`."""
        return self._mean(self._code_C - np.rint(self._code_C / ratio) * ratio)

    def _mean(self, moved_C: NDArray[np.number]) -> float:
        """E||m + o||^2 - E||o||^2, o being the offsets."""
        total = float((moved_C * (moved_C * self._count_C + 2 * self._offset_C)).sum())
        return total / float(self.codes_KN.shape[1])


def measure_cells(steps: Sequence[float], largest: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre (from the code) and width of the cell of each code from -largest to largest, all values being as likely.

    After one rounding these are 0 and 1. After several, a cell is a few cells of the first step.
    """
    spacing = steps[0] / _POINTS
    points = (np.arange(int((largest + 1) * steps[-1] / spacing)) + 0.5) * spacing
    points = np.concatenate([-points[::-1], points])
    rounded = points
    for step in steps:
        rounded = np.rint(rounded / step) * step
    code = np.rint(rounded / steps[-1]).astype(np.int64)
    here = np.abs(code) <= largest
    place, points = code[here] + largest, points[here] / steps[-1]
    count = np.bincount(place, minlength=2 * largest + 1)
    mean = np.bincount(place, points) / count
    variance = np.bincount(place, points**2) / count - mean**2
    return mean - np.arange(-largest, largest + 1), np.sqrt(12 * variance)


def _mean_offsets(
    count_C: NDArray[np.integer], centre: NDArray[np.float64], width: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean distance of a coordinate from its code, for each code that is counted but the first and the last.

    Of a density exp(-2 a u / w) over a cell of width w, u from its centre, the mean is -w (coth a - 1/a) / 2.
    """
    largest = len(centre) // 2
    density, place = (count_C + 0.5) / width, centre + np.arange(-largest, largest + 1)
    inner = slice(1, -1)
    slope = np.log(density[:-2] / density[2:]) / (place[2:] - place[:-2]) * width[inner] / 2
    slope[np.abs(slope) < _FLAT] = _FLAT
    offsets: NDArray[np.float64] = centre[inner] - width[inner] * (1 / np.tanh(slope) - 1 / slope) / 2
    return offsets
