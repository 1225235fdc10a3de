"""Small whole numbers <-> bytes: several values of one component to a byte, and a list of the few that do not fit.

The components of a stream are sorted so that those of one packing are a contiguous range. In packing order:

    wide     int16, one value          triple   |value| <= 2, 3 to a byte, digits of base 5
    byte     int8, one value           five     |value| <= 1, 5 to a byte, digits of base 3
    pair     |value| <= 7, 2 to a byte, digits of base 15
    zero     nothing is stored

A byte holds consecutive tokens of one component, the first in the highest digit, each digit being value + limit; the
last byte of a view is filled up with zeros. A value beyond its packing's limit is an *escape*: it is packed as 0 and
kept as (component * tokens + token, value) beside. Nothing saturates.

Unpacking to float32 gives 1.5 to 5 * 10^9 values/s on one core, the more the fewer share a byte; much of it is writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from teacher_cache.device import CodedArray


LARGEST_CODE = 2**15 - 1
ZERO = "zero"
_VALUES_AT_ONCE = 2**18  # from bytes to floats they stay in the cache


@dataclass(frozen=True, kw_only=True)
class Packing:
    """`per_byte` values of magnitude up to `limit` to one element of type `dtype`."""

    name: str
    limit: int
    per_byte: int
    dtype: str

    def length(self, tokens: int) -> int:
        """Elements that hold so many tokens of one component."""
        return -(-tokens // self.per_byte)

    def pack(self, codes_CN: NDArray[np.int16]) -> NDArray[np.integer[Any]]:
        """[C, N] values within the limit -> [C, length(N)] elements."""
        if self.per_byte == 1:
            return codes_CN.astype(self.dtype)
        components, tokens = codes_CN.shape
        radix = 2 * self.limit + 1
        digits = np.full((components, self.length(tokens) * self.per_byte), self.limit, dtype=np.uint8)
        np.add(codes_CN, self.limit, out=digits[:, :tokens], casting="unsafe")
        packed = np.ascontiguousarray(digits[:, :: self.per_byte])
        for place in range(1, self.per_byte):
            packed *= np.uint8(radix)
            packed += digits[:, place :: self.per_byte]
        return packed

    def unpack(self, packed: CodedArray, start: int, stop: int, step: float, out_CN: torch.Tensor) -> None:
        """Write tokens start..stop of packed components [C, length(N)], times `step`, to float32 rows on any device.

        What is packed may be there already; else it goes there packed, and only the range that is asked for.
        """
        import torch

        from teacher_cache.device import to_device

        first = start // self.per_byte
        part_CL = packed[:, first : self.length(stop)]
        wanted = slice(start - first * self.per_byte, stop - first * self.per_byte)
        if isinstance(part_CL, torch.Tensor) or out_CN.device.type != "cpu":
            values_CN = self.look_up(to_device(part_CL, out_CN.device))
            out_CN.copy_(values_CN[:, wanted]).mul_(step)
            return
        out = out_CN.numpy()
        rows = max(1, _VALUES_AT_ONCE // (stop - start))
        for row in range(0, len(part_CL), rows):
            piece = out[row : row + rows]
            np.copyto(piece, self.digits(part_CL[row : row + rows])[:, wanted])
            piece *= np.float32(step)

    def look_up(self, packed_CL: torch.Tensor) -> torch.Tensor:
        """Every value in packed components, on their device, by a table of the values in each byte."""
        if self.per_byte == 1:
            return packed_CL
        return _digit_table(self, packed_CL.device)[packed_CL.long()].flatten(1)

    def digits(self, packed_CL: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Every value in packed components, by arithmetic: half the time of a table in numpy."""
        if self.per_byte == 1:
            return packed_CL
        radix = 2 * self.limit + 1
        if self.per_byte == 2:
            # both digits as one number, high + 256 * low: storing every second byte would take most of the time
            both_CL = packed_CL.astype(np.uint16)
            both_CL <<= 8
            both_CL -= (packed_CL // np.uint8(radix)) * np.uint16(256 * radix - 1)
            values = both_CL.astype("<u2", copy=False).view(np.uint8)
        else:
            digits_CLP = np.empty((*packed_CL.shape, self.per_byte), dtype=np.uint8)
            for place in range(self.per_byte - 1, 0, -1):
                higher_CL = packed_CL // np.uint8(radix)
                digits_CLP[..., place] = packed_CL - higher_CL * np.uint8(radix)
                packed_CL = higher_CL
            digits_CLP[..., 0] = packed_CL
            values = digits_CLP.reshape(len(packed_CL), -1)
        values -= np.uint8(self.limit)
        return values.view(np.int8)


@lru_cache
def _digit_table(packing: Packing, device: torch.device) -> torch.Tensor:
    """The values in each byte."""
    import torch

    return torch.from_numpy(packing.digits(np.arange(256, dtype=np.uint8)[:, None])).to(device)


PACKINGS = (
    Packing(name="wide", limit=LARGEST_CODE, per_byte=1, dtype="int16"),
    Packing(name="byte", limit=127, per_byte=1, dtype="int8"),
    Packing(name="pair", limit=7, per_byte=2, dtype="uint8"),
    Packing(name="triple", limit=2, per_byte=3, dtype="uint8"),
    Packing(name="five", limit=1, per_byte=5, dtype="uint8"),
)


@dataclass(frozen=True, kw_only=True)
class PackedCodes:
    """The codes of one stream in one view: an array per packing, and the escapes in ascending order of position."""

    packed: Mapping[str, NDArray[np.integer[Any]]]
    escape_index: NDArray[np.int64]
    escape_value: NDArray[np.int16]


def ranges(components: Mapping[str, int]) -> Iterator[tuple[Packing, slice]]:
    """The packings in use with the components that each holds."""
    first = 0
    for packing in PACKINGS:
        count = components[packing.name]
        if count:
            yield packing, slice(first, first + count)
        first += count


def pack_codes(codes_DN: NDArray[np.int16], components: Mapping[str, int]) -> PackedCodes:
    """Pack the codes of one view, components in packing order; `components` counts those of each packing."""
    tokens = codes_DN.shape[1]
    packed: dict[str, NDArray[np.integer[Any]]] = {}
    indices, values = [], []
    stored = 0
    for packing, part in ranges(components):
        codes_CN, fits_CN = codes_DN[part], None
        if packing.limit < LARGEST_CODE:
            fits_CN = np.abs(codes_CN) <= packing.limit
        if fits_CN is not None and not fits_CN.all():
            indices.append(np.flatnonzero(~fits_CN) + part.start * tokens)
            values.append(codes_CN[~fits_CN])
            codes_CN = np.where(fits_CN, codes_CN, np.int16(0))
        packed[packing.name] = packing.pack(codes_CN)
        stored = part.stop
    beyond_CN = codes_DN[stored:]
    indices.append(np.flatnonzero(beyond_CN) + stored * tokens)
    values.append(beyond_CN[beyond_CN != 0])
    return PackedCodes(packed=packed, escape_index=np.concatenate(indices), escape_value=np.concatenate(values))


def choose_packings(codes_ND: NDArray[np.int16], group: int) -> tuple[NDArray[np.intp], dict[str, int]]:
    """The order in which to sort the components of sample codes [N, D], and how many fall to each packing.

    Each component gets the packing that costs least: order-0 entropy of its bytes, which is what zstd's Huffman stage
    comes to, plus the escapes. Packings hold whole groups of `group` components where the width allows, so that chunks
    of several components divide them; components that do not fill a group move to the wider packing.
    """
    choice = np.array([_cheapest(np.ascontiguousarray(codes_N)) for codes_N in codes_ND.T])
    spread = (codes_ND.astype(np.float64) ** 2).mean(axis=0)
    order = np.lexsort((-spread, choice))
    width = len(choice)
    components, first = {}, 0
    for number, packing in enumerate(PACKINGS):
        last = min(width, -(-int((choice <= number).sum()) // group) * group)
        components[packing.name] = max(0, last - first)
        first = max(first, last)
    components[ZERO] = width - first
    return order, components


_ESCAPE_BITS = 32.0
_MOST_ESCAPES = 1 / 200


def _cheapest(codes_N: NDArray[np.int16]) -> int:
    """The number of the packing, len(PACKINGS) for `zero`, that stores these values in the fewest bits."""
    magnitude_N = np.abs(codes_N)
    costs = []
    for packing in PACKINGS:
        beyond_N = magnitude_N > packing.limit
        share = float(beyond_N.mean())
        packed = packing.pack(np.where(beyond_N, np.int16(0), codes_N)[None])
        bits = _entropy(packed[0]) / packing.per_byte
        costs.append(bits + share * _ESCAPE_BITS if share <= _MOST_ESCAPES else np.inf)
    share = float((codes_N != 0).mean())
    costs.append(share * _ESCAPE_BITS if share <= _MOST_ESCAPES else np.inf)
    # the narrowest of equals: fewer bytes to decode
    return len(costs) - 1 - int(np.argmin(costs[::-1]))


def _entropy(elements: NDArray[np.integer[Any]]) -> float:
    """Order-0 entropy per element, byte by byte, at least one bit a byte: no Huffman code is shorter."""
    bits = 0.0
    for plane in elements.view(np.uint8).reshape(len(elements), -1).T:
        counts = np.bincount(plane, minlength=256)
        shares = counts[counts > 0] / len(plane)
        bits += max(1.0, float(-(shares * np.log2(shares)).sum())) if len(shares) > 1 else 0.0
    return bits
