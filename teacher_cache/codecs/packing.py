"""Small whole numbers <-> bytes: several values of one component to a byte, and a list of the few that do not fit.

The components of a stream are sorted so that those of one packing are a contiguous range. In packing order:

    wide     int16, one value          triple   |value| <= 2, 3 to a byte, digits of base 5
    byte     int8, one value           five     |value| <= 1, 5 to a byte, digits of base 3
    pair     |value| <= 7, 2 to a byte, digits of base 15
    zero     nothing is stored

A byte holds consecutive tokens of one component, the first in the highest digit, each digit being value + limit; the
last byte of a view is filled up with zeros. A value beyond its packing's limit is an *escape*: it is packed as 0 and
kept as (component * tokens + token, value) beside. Nothing saturates.

Packing runs where the codes are, on any device, so that bytes leave it and not numbers; on a CPU it goes over as many
components at a time as stay in the cache, from the product of the rotation to bytes. It takes 0.5 to 1.5 ns a value on
one core. Unpacking to float32 gives 1.5 to 5 * 10^9 values/s, the more the fewer share a byte; much of it is writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import TeacherError

if TYPE_CHECKING:
    import torch

    from teacher_cache.device import CodedArray

LARGEST_CODE = 2**15 - 1
ZERO = "zero"
VALUES_AT_ONCE = 2**18  # from bytes to floats they stay in the cache
_CODES_AT_ONCE = 2**20  # from floats to bytes too; with fewer, torch's threads would wait for each other more often


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

    @property
    def radix(self) -> int:
        """How many values a digit can have."""
        return 2 * self.limit + 1

    @property
    def of_zeros(self) -> int:
        """The element that holds nothing but zeros."""
        return self.limit * sum(self.radix**place for place in range(self.per_byte)) if self.per_byte > 1 else 0

    def pack(self, codes_CN: torch.Tensor) -> torch.Tensor:
        """[C, N] whole numbers within the limit, of any type -> [C, length(N)] elements, on the same device."""
        import torch

        if self.per_byte == 1:
            return codes_CN.to(getattr(torch, self.dtype))
        if lacking := -codes_CN.shape[1] % self.per_byte:
            codes_CN = torch.nn.functional.pad(codes_CN, (0, lacking))
        digits_CN = codes_CN.to(torch.int8, copy=True, memory_format=torch.contiguous_format).add_(self.limit)
        if self.per_byte == 2:
            # as one number first + 256 * second, times 1 + 256 * radix, modulo 2^16: its high byte is the packed one
            both_CL = digits_CN.view(torch.int16).mul_(1 + 256 * self.radix)
            return (both_CL >> 8).to(torch.uint8)
        digits_CN = digits_CN.view(torch.uint8)
        packed_CL = digits_CN[:, :: self.per_byte].clone()
        for place in range(1, self.per_byte):
            packed_CL.mul_(self.radix).add_(digits_CN[:, place :: self.per_byte])
        return packed_CL

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
        rows = max(1, VALUES_AT_ONCE // (stop - start))
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
        radix = self.radix
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


def pack_codes(codes_DN: torch.Tensor, components: Mapping[str, int], start: int = 0) -> PackedCodes:
    """Round and pack the codes of tokens `start`, … of one view, components in packing order, on any device.

    `components` counts those of each packing. `codes_DN` are whole numbers or floats to be rounded, and are used up.
    What is packed is on the host; where the first token lies within a byte, zeros stand for those before it. Escapes
    are counted from `start`.

    Raises:
        TeacherError: a value is not finite, or is beyond any step that 16 bits can count.
    """
    import torch

    from teacher_cache.device import to_host

    tokens, stored = codes_DN.shape[1], 0
    packed: dict[str, NDArray[np.integer[Any]]] = {}
    escapes = _Escapes(tokens)
    for packing, part in ranges(components):
        lead = start % packing.per_byte
        elements = np.empty((part.stop - part.start, packing.length(lead + tokens)), dtype=packing.dtype)
        for first, codes_CN in _pieces(codes_DN[part]):
            escapes.take(codes_CN, packing.limit, part.start + first)
            if lead:
                codes_CN = torch.nn.functional.pad(codes_CN, (lead, 0))
            elements[first : first + len(codes_CN)] = to_host(packing.pack(codes_CN))
        packed[packing.name], stored = elements, part.stop
    for first, codes_CN in _pieces(codes_DN[stored:]):
        escapes.take(codes_CN, 0, stored + first)
    return PackedCodes(packed=packed, escape_index=escapes.index(), escape_value=escapes.value())


def _pieces(codes_CN: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """All components, on a CPU a few at a time, and the number of the first of them."""
    at_once = len(codes_CN)
    if codes_CN.device.type == "cpu":
        at_once = max(1, _CODES_AT_ONCE // max(1, codes_CN.shape[1]))
    for first in range(0, len(codes_CN), max(1, at_once)):
        yield first, codes_CN[first : first + at_once]


class _Escapes:
    """Collects what does not fit, in ascending order of component * tokens + token."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._index = [np.empty(0, dtype=np.int64)]
        self._value = [np.empty(0, dtype=np.int16)]

    def take(self, codes_CN: torch.Tensor, limit: int, first: int) -> None:
        """Round components `first`, … in place, and set what is beyond the limit to 0."""
        import torch

        from teacher_cache.device import to_device, to_host

        if codes_CN.is_floating_point():
            codes_CN.round_()
        if not codes_CN.numel():
            return
        # of each component: torch finds these fastest, and few of them have escapes
        low_C, high_C = (to_host(ends_C).astype(np.float64) for ends_C in (codes_CN.amin(dim=1), codes_CN.amax(dim=1)))
        far_F = np.flatnonzero(~((low_C >= -limit) & (high_C <= limit)))
        if not len(far_F):
            return
        refuse_beyond(float(np.maximum(-low_C, high_C)[far_F].max()))
        component_F = to_device(far_F, codes_CN.device)
        found_E, token_E = (codes_CN[component_F].abs() > limit).nonzero(as_tuple=True)
        component_E = component_F[found_E]
        self._index.append(to_host((component_E + first) * self._tokens + token_E))
        self._value.append(to_host(codes_CN[component_E, token_E].to(torch.int16)))
        codes_CN[component_E, token_E] = 0

    def index(self) -> NDArray[np.int64]:
        return np.concatenate(self._index)

    def value(self) -> NDArray[np.int16]:
        return np.concatenate(self._value)


def refuse_beyond(largest: float) -> None:
    """Refuse a code of this magnitude if 16 bits cannot hold it.

    Raises:
        TeacherError: they cannot, or it is undefined.
    """
    if not largest <= LARGEST_CODE:
        raise TeacherError(
            f"the teacher gave a value {largest:g} steps from the mean (16 bits hold {LARGEST_CODE}): a cut-off or "
            "undefined target would ruin training; check the checkpoint, use --dtype float32 if the teacher "
            "overflows in half precision, or a coarser --precision"
        )


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
    """The number of the packing, len(PACKINGS) for `zero`, that stores these values in the fewest bits.

    The entropy of a tuple is at most the sum of its places', which share one distribution, so values to a byte of their
    own take no fewer bits than two or more to a byte (but for the zeros that fill the last byte), nor two bytes a value
    than one. Such packings are not weighed where a narrower one holds all values.
    """
    import torch

    magnitude_N = np.abs(codes_N)
    largest = int(magnitude_N.max(initial=0))
    narrower = [packing.limit for packing in PACKINGS[1:]]
    costs = []
    for packing, next_limit in zip(PACKINGS, [*narrower, -1], strict=True):
        beyond = int((magnitude_N > packing.limit).sum()) if largest > packing.limit else 0
        share = beyond / len(codes_N)
        if share > _MOST_ESCAPES or (packing.per_byte == 1 and largest <= next_limit):
            costs.append(np.inf)
            continue
        held_N = np.where(magnitude_N > packing.limit, np.int16(0), codes_N) if beyond else codes_N
        packed_1L = packing.pack(torch.from_numpy(held_N[None]))
        costs.append(_entropy(packed_1L[0].numpy()) / packing.per_byte + share * _ESCAPE_BITS)
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
