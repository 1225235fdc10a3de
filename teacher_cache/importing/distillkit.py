"""DistillKit's packed log-probabilities (`compressed_logprobs`, `bytepacked_indices`) -> rows, by a decoder of our own.

The layout is described in the README of https://github.com/arcee-ai/DistillKit (Logit Compression, Compression
Deep-Dive) and by the fields of its configuration, which is not in the files: it lies beside them as
compression_config.yaml, or stands below `logprob_compressor` in the configuration of a training. Of a row of T tokens
there are T - 1 entries, entry t being the distribution after token t; some files have one after the last token too,
which belongs to no token of the row. An entry is two strings of bytes:

    compressed_logprobs   exact_k values of exact_dtype | a coefficient of term_dtype for each of polynomial_terms |
                          for each of residual_bins: a scale of scale_dtype, num_elements numbers of element_bits
    bytepacked_indices    k ids of ceil(log2 d) bits

Values are little-endian, numbers of bits lie one after another from the highest bit of the first byte on, and each
group of them ends with its byte. Ids are those of the k most probable tokens, the most probable first. The first
exact_k log-probabilities are the exact values; number j of the others, from 0, is the sum of coefficient times term at
x = j (or j / (k - exact_k - 1), with normalize_t), a term being a power of x, `sqrt` or `exp`, and of its residual
where a bin reaches so far: (q - 2^(bits - 1)) * scale, or (2 q - 1) * scale of one bit. With delta_encoding all of
these are differences to the value before. Arithmetic here is float64.

A polynomial that is fitted to ten probable digits and forty improbable words begins far above the digits, as far as
probabilities of 20 and more. As the ids are sorted, no value is taken to be above the one before it; what sums up to
more than 1 even so is scaled; where that is by more than rounding, the place is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SettingsError
from teacher_cache.importing.files import Record
from teacher_cache.importing.source import Distributions, refuse

BYTES, IDS = "compressed_logprobs", "bytepacked_indices"
_LEGACY = {"packed_indices", "exact_values", "coeffs"}
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_ROUNDED, _FITTED = 0.01, 1.0
"""How far beyond 1 probabilities may sum up: those that are kept in half precision, and those for which a polynomial
stands. Beyond 1 they are scaled to it."""
_MOST_BITS = 64


@dataclass(frozen=True, kw_only=True)
class ResidualBin:
    """Residuals of the next `num_elements` values, `element_bits` each, and their scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the entries are packed: the fields of DistillKit's configuration that decoding needs."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """The packing that a configuration describes, its values as text, by itself or as part of a training's.

        Raises:
            SettingsError: it describes none.
        """
        for name in ("teacher", "logprob_compressor"):
            if isinstance(inside := content.get(name), Mapping):
                content = inside
        lacking = [name for name in ("d", "k", "exact_k") if name not in content]
        if lacking:
            raise SettingsError(
                f"--packing has no {', '.join(lacking)}: how the entries are packed is not known, and they would be "
                "misread; give the compression_config.yaml that lies beside the files, or the configuration of a "
                "training with its logprob_compressor"
            )
        found = cls(
            d=_number(content, "d"),
            k=_number(content, "k"),
            exact_k=_number(content, "exact_k"),
            exact_dtype=_dtype(content, "exact_dtype"),
            term_dtype=_dtype(content, "term_dtype"),
            polynomial_terms=tuple(map(_term, _listed(content.get("polynomial_terms")))),
            residual_bins=tuple(map(_bin, _listed(content.get("residual_bins")))),
            delta_encoding=_switch(content, "delta_encoding", default=True),
            normalize_t=_switch(content, "normalize_t", default=False),
        )
        binned = sum(one.num_elements for one in found.residual_bins)
        if not 0 <= found.exact_k <= found.k or binned > found.k - found.exact_k or not 1 <= found.k <= found.d:
            raise SettingsError(
                f"--packing has exact_k {found.exact_k}, k {found.k}, d {found.d} and {binned} residuals: exact values "
                "and residuals are of the k ids, and those of the vocabulary; give the configuration as it was written"
            )
        return found

    @property
    def id_bits(self) -> int:
        """Bits of an id below d."""
        return (self.d - 1).bit_length()

    @property
    def entry_bytes(self) -> tuple[int, int]:
        """Bytes of an entry's log-probabilities, and of its ids."""
        size = self.exact_k * _SIZES[self.exact_dtype] + len(self.polynomial_terms) * _SIZES[self.term_dtype]
        for one in self.residual_bins:
            size += _SIZES[one.scale_dtype] + _bytes_of(one.num_elements, one.element_bits)
        return size, _bytes_of(self.k, self.id_bits)

    def ids(self, bytes_PB: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The ids [P, k] of P entries."""
        return unpack(bytes_PB, self.id_bits, self.k).astype(np.int64)

    def log_probs(self, bytes_PB: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The log-probabilities [P, k] of P entries."""
        taken = 0

        def take(count: int) -> NDArray[np.uint8]:
            nonlocal taken
            taken += count
            return bytes_PB[:, taken - count : taken]

        values_Pk = np.zeros((len(bytes_PB), self.k))
        values_Pk[:, : self.exact_k] = _floats(take(self.exact_k * _SIZES[self.exact_dtype]), self.exact_dtype)
        if self.polynomial_terms:
            coefficients_PC = _floats(take(len(self.polynomial_terms) * _SIZES[self.term_dtype]), self.term_dtype)
            values_Pk[:, self.exact_k :] = coefficients_PC @ self._terms().T
        first = self.exact_k
        for one in self.residual_bins:
            scale_P1 = _floats(take(_SIZES[one.scale_dtype]), one.scale_dtype)
            packed = take(_bytes_of(one.num_elements, one.element_bits))
            numbers = unpack(packed, one.element_bits, one.num_elements).astype(np.float64)
            levels = 2 * numbers - 1 if one.element_bits == 1 else numbers - 2.0 ** (one.element_bits - 1)
            values_Pk[:, first : first + one.num_elements] += levels * scale_P1
            first += one.num_elements
        if self.delta_encoding:
            values_Pk = values_Pk.cumsum(axis=1)
        return np.minimum.accumulate(values_Pk, axis=1)

    def _terms(self) -> NDArray[np.float64]:
        """Each term at each of the values that it is fitted to [k - exact_k, C]."""
        count = self.k - self.exact_k
        x = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack([functions[one](x) if isinstance(one, str) else x**one for one in self.polynomial_terms], 1)


def unpack(bytes_PB: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """The first `count` numbers of so many bits in each row of bytes [P, B], the highest bit first: [P, count]."""
    flat = np.unpackbits(bytes_PB, axis=1)[:, : count * bits].reshape(len(bytes_PB), count, bits)
    found = np.zeros((len(bytes_PB), count), dtype=np.uint64)
    for bit in range(bits):
        found = found << np.uint64(1) | flat[:, :, bit]
    return found


def is_packed(record: Record) -> bool:
    """Whether a record is of this shape, or of the one before it."""
    return {BYTES, IDS} <= record.keys() or record.keys() >= _LEGACY


def read_packed(record: Record, tokens: int, packing: Packing, where: str) -> Distributions:
    """The distributions of a row of so many tokens.

    Raises:
        SourceError: it is packed otherwise.
    """
    if BYTES not in record:
        refuse(
            where,
            "it is packed in DistillKit's legacy way, as logits without their sum over the vocabulary: no probability "
            "can be told from them; give files with compressed_logprobs",
        )
    arrays = []
    for name, size in zip((BYTES, IDS), packing.entry_bytes, strict=True):
        found = _as_bytes(record[name])
        if found is None or found.ndim != 2 or found.shape[1] != size or len(found) not in (tokens, tokens - 1):
            shape = "a table of other things" if found is None else f"the shape {found.shape}"
            refuse(
                where,
                f"{name!r} has {shape} where {tokens - 1} (or {tokens}) entries of {size} bytes should be, as the "
                f"{packing.k} ids of --packing take: it is not how these files were packed, or they are cut",
            )
        arrays.append(found[: tokens - 1])
    ids_Pk, log_probs_Pk = packing.ids(arrays[1]), packing.log_probs(arrays[0])
    places = len(ids_Pk)
    return Distributions(
        position_P=np.arange(places),
        count_P=np.full(places, packing.k, dtype=np.int64),
        top_P=np.full(places, packing.k, dtype=np.int64),
        ids_E=ids_Pk.ravel(),
        log_probs_E=log_probs_Pk.ravel(),
        rounding=_FITTED if packing.polynomial_terms else _ROUNDED,
    )


def _as_bytes(values: Any) -> NDArray[np.uint8] | None:
    """A table of bytes; None where it is none."""
    if isinstance(values, np.ndarray):
        return values
    try:
        found = np.array(values)
    except ValueError:  # rows of unlike lengths
        return None
    whole = found.dtype.kind in "iu" and found.ndim == 2 and (found >= 0).all() and (found < 256).all()
    return found.astype(np.uint8) if whole else None


def _floats(bytes_PB: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    raw = np.ascontiguousarray(bytes_PB)
    if dtype == "bfloat16":
        # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view(f"<f{_SIZES[dtype]}").astype(np.float64)


def _bytes_of(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _listed(value: Any) -> Sequence[Any]:
    """A list; nothing where there is none, or null."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _number(content: Mapping[str, Any], name: str, most: int = 2**24) -> int:
    text = str(content.get(name))
    if not text.isdecimal() or int(text) > most:
        raise SettingsError(
            f"--packing has {name} {content.get(name)!r}: it must be a whole number up to {most}; give the "
            "configuration as it was written"
        )
    return int(text)


def _dtype(content: Mapping[str, Any], name: str) -> str:
    found = str(content.get(name, "float32"))
    if found not in _SIZES:
        raise SettingsError(f"--packing has {name} {found!r}: it must be one of {', '.join(_SIZES)}")
    return found


def _switch(content: Mapping[str, Any], name: str, *, default: bool) -> bool:
    text = str(content.get(name, default)).lower()
    if text not in ("true", "false"):
        raise SettingsError(f"--packing has {name} {content.get(name)!r}: it is a switch, true or false")
    return text == "true"


def _term(text: Any) -> int | str:
    if text in ("sqrt", "exp"):
        return str(text)
    if not str(text).isdecimal() or int(text) > _MOST_BITS:
        raise SettingsError(f"--packing has a polynomial term {text!r}: terms are powers such as 0, 1, 2, sqrt and exp")
    return int(text)


def _bin(content: Any) -> ResidualBin:
    if not isinstance(content, Mapping):
        raise SettingsError(f"--packing has {content!r} among residual_bins: give bits, elements and scale of each")
    found = ResidualBin(
        scale_dtype=_dtype(content, "scale_dtype"),
        element_bits=_number(content, "element_bits", _MOST_BITS),
        num_elements=_number(content, "num_elements"),
    )
    if not found.element_bits or not found.num_elements:
        raise SettingsError(f"--packing has {dict(content)!r} among residual_bins: it holds nothing; leave it out")
    return found
