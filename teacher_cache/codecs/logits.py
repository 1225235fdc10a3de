"""Distributions at masked positions <-> small arrays.

Two forms, both of P places of one view (places of a row that hold no masked position are left at zeros):

    TopkCodec     K most probable ids, their log-probabilities, the log of the mass outside them
    SampleCodec   N ids drawn from the whole distribution, kept as distinct ids with their counts

Ids are split into planes of one byte, `ids/low`, `ids/middle`, `ids/high`, as many as the vocabulary needs: exact up to
2^24 ids, and the upper planes compress. Log-probabilities are coded by `LogProbabilityCodec`. Draws are ragged: a byte
a place says how many distinct ids it has, and these lie one after another, ascending within a place and each as the
distance to the one before it, which saves an eighth on disk.

Arrays of top-k are component-major, [K, P], like coded vectors. Nothing here touches a disk or knows a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.codecs.base import Coded, CodedArraySpec
from teacher_cache.contract.targets import MOST_DRAWS
from teacher_cache.errors import SettingsError, TeacherError

if TYPE_CHECKING:
    import torch


LOG_PROBABILITY_CODECS = ("float16", "root8")
_ROOT = 8
_PLANES = ("low", "middle", "high")


@dataclass(frozen=True, kw_only=True)
class TopkEntries:
    """[P, K] ids and log-probabilities, most probable first, and the log of the mass outside them [P]."""

    ids_PK: torch.Tensor
    log_probs_PK: torch.Tensor
    log_tail_P: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DrawnEntries:
    """[P, K'] drawn ids and how often each was drawn; where a place has fewer than K' distinct ids, the count is 0."""

    ids_PK: torch.Tensor
    counts_PK: torch.Tensor


class LogProbabilityCodec:
    """Log-probabilities of one place, most probable first, each at most 0; -inf is probability 0 and stays so.

    float16: as they are. root8: the eighth root of p in 255 steps, c = round(255 (1 - p^(1/8))), kept as the difference
    c_k - c_{k-1}: mostly 0 or 1, which the compressor turns into two or three bits. The relative error of p is at most
    1.6% near 1, 2.8% at 0.01, 5.1% at 1e-4, 17% at 1e-8; below 2e-22 p becomes 0.
    """

    def __init__(self, name: str) -> None:
        if name not in LOG_PROBABILITY_CODECS:
            raise SettingsError(
                f"codec {name!r} of log-probabilities is unknown: they could be neither written nor read; choose one "
                "of " + ", ".join(LOG_PROBABILITY_CODECS)
            )
        self.name = name

    def array(self, entries: int) -> CodedArraySpec:
        """One array of codes."""
        return CodedArraySpec(
            name="log_probs", dtype="uint8" if self.name == "root8" else "float16", components=entries
        )

    def encode(self, log_probs_PK: torch.Tensor) -> NDArray[np.generic]:
        """Codes [K, P].

        Raises:
            TeacherError: a log-probability is undefined.
        """
        import torch

        refuse_undefined(log_probs_PK)
        if self.name == "float16":
            return np.asarray(log_probs_PK.to(torch.float16).T.contiguous().cpu().numpy())
        codes_PK = (log_probs_PK.to(torch.float32) / _ROOT).expm1_().mul_(-255).round_().to(torch.uint8)
        # modulo 256, so that no order of the entries is lost
        codes_PK[:, 1:] -= codes_PK[:, :-1].clone()
        return np.asarray(codes_PK.T.contiguous().cpu().numpy())

    def decode(self, codes_KP: torch.Tensor) -> torch.Tensor:
        """Float32 log-probabilities [P, K]."""
        import torch

        if self.name == "float16":
            return codes_KP.T.to(torch.float32)
        codes_PK = codes_KP.cumsum(0, dtype=torch.int32).T & 255
        return torch.log1p(codes_PK.to(torch.float32) / -255).mul_(_ROOT)

    def error_bound(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Largest possible distance of each decoded *probability* from exp(log_probs), in float64."""
        import torch

        log_probs = log_probs.double()
        if self.name == "float16":
            step = (log_probs.abs() * 2.0**-11).clamp_min(2.0**-25)
            return torch.where(log_probs.isneginf(), 0, log_probs.exp() * step.expm1())
        root = (log_probs / _ROOT).exp()
        # the rounding of the code, which float32 may take the wrong way at the middle of two, and of the decoding
        half = 0.5 / 255 + 2.0**-23
        return (root + half).pow(_ROOT) - root.pow(_ROOT) + log_probs.exp() * 2.0**-18


@dataclass(frozen=True, kw_only=True)
class TopkCodec:
    """The `entries` most probable ids of a vocabulary of `vocab_size`."""

    entries: int
    vocab_size: int
    log_probs: str

    def arrays(self) -> tuple[CodedArraySpec, ...]:
        """The arrays that `encode` returns."""
        return (
            *(_byte_array(f"ids/{plane}", self.entries) for plane in id_planes(self.vocab_size)),
            LogProbabilityCodec(self.log_probs).array(self.entries),
            CodedArraySpec(name="log_tail", dtype="float16", components=None),
        )

    def encode(self, topk: TopkEntries) -> Coded:
        """Code P places.

        Raises:
            TeacherError: a probability is undefined.
        """
        import torch

        refuse_undefined(topk.log_tail_P)
        planes = split_ids(topk.ids_PK.T.cpu().numpy(), self.vocab_size)
        return {
            **{f"ids/{plane}": values for plane, values in planes.items()},
            "log_probs": LogProbabilityCodec(self.log_probs).encode(topk.log_probs_PK),
            "log_tail": topk.log_tail_P.to(torch.float16).cpu().numpy(),
        }

    def decode(self, coded: Mapping[str, torch.Tensor]) -> TopkEntries:
        """What was coded, from tensors on any device: int64 ids, float32 logarithms."""
        import torch

        return TopkEntries(
            ids_PK=_join_ids(coded, self.vocab_size).T,
            log_probs_PK=LogProbabilityCodec(self.log_probs).decode(coded["log_probs"]),
            log_tail_P=coded["log_tail"].to(torch.float32),
        )


@dataclass(frozen=True, kw_only=True)
class PackedDraws:
    """How many distinct ids each place has, and arrays of one byte an id, place after place."""

    distinct_P: NDArray[np.uint8]
    entries: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class SampleCodec:
    """`draws` ids drawn with replacement at each place, from a vocabulary of `vocab_size`."""

    draws: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= MOST_DRAWS:
            raise SettingsError(
                f"{self.draws!r} draws a position cannot be kept: a count has one byte; ask for 1 to {MOST_DRAWS}"
            )

    def entry_names(self) -> tuple[str, ...]:
        """The arrays of one byte for each distinct id."""
        return (*(f"ids/{plane}" for plane in id_planes(self.vocab_size)), "counts")

    def pack(self, ids_PN: NDArray[np.integer[Any]]) -> PackedDraws:
        """Pack the drawn ids of P places, ascending in each; -1 throughout a place where nothing was drawn."""
        first_PN = ids_PN >= 0
        first_PN[:, 1:] &= ids_PN[:, 1:] != ids_PN[:, :-1]
        distinct_P = first_PN.sum(axis=1)
        start_E = np.flatnonzero(first_PN)
        place_E = start_E // self.draws
        # a run ends where the next one starts, or with its place
        next_E = np.append(start_E[1:], ids_PN.size)
        counts_E = np.minimum(next_E, (place_E + 1) * self.draws) - start_E
        ids_E = ids_PN.ravel()[start_E]
        gaps_E = np.diff(ids_E, prepend=0)
        leads_E = np.diff(place_E, prepend=-1) > 0
        planes = split_ids(np.where(leads_E, ids_E, gaps_E), self.vocab_size)
        return PackedDraws(
            distinct_P=distinct_P.astype(np.uint8),
            entries={
                **{f"ids/{plane}": values for plane, values in planes.items()},
                "counts": counts_E.astype(np.uint8),
            },
        )

    def unpack(
        self,
        distinct_P: NDArray[np.uint8],
        entries: Mapping[str, NDArray[np.uint8]],
        start: int,
        stop: int,
        device: str | torch.device,
    ) -> DrawnEntries:
        """Places start..stop of packed draws: int64 ids [P, N] and int32 counts, N being the draws.

        `distinct_P` and `entries` hold the places from 0 on; entries behind the last id may follow. The width is the
        same for every range of places, so that ranges can be joined.
        """
        import torch

        from teacher_cache.device import to_device

        first = int(distinct_P[:start].sum(dtype=np.int64))
        last = first + int(distinct_P[start:stop].sum(dtype=np.int64))
        part = {name: to_device(entries[name][first:last], device) for name in self.entry_names()}
        distinct = to_device(distinct_P[start:stop].astype(np.int64), device)
        held_PN = torch.arange(self.draws, device=distinct.device) < distinct[:, None]
        gaps_PN = torch.zeros(held_PN.shape, dtype=torch.int64, device=distinct.device)
        counts_PN = torch.zeros(held_PN.shape, dtype=torch.int32, device=distinct.device)
        gaps_PN.masked_scatter_(held_PN, _join_ids(part, self.vocab_size))
        counts_PN.masked_scatter_(held_PN, part["counts"].to(torch.int32))
        return DrawnEntries(ids_PK=gaps_PN.cumsum(1), counts_PK=counts_PN)


def refuse_undefined(log_probs: torch.Tensor) -> None:
    """Refuse log-probabilities that are not numbers: undefined or infinite logits lead to them.

    Raises:
        TeacherError: one of the numbers is not a number.
    """
    if bool(log_probs.isnan().any()):
        raise TeacherError(
            "the teacher gave undefined or infinite logits: there is no distribution to learn from; check the "
            "checkpoint, or use --dtype float32 if the teacher overflows in half precision"
        )


def id_planes(vocab_size: int) -> tuple[str, ...]:
    """The planes of one byte that ids below `vocab_size` need.

    Raises:
        SettingsError: three bytes are not enough.
    """
    if vocab_size > 2**24:
        raise SettingsError(
            f"a vocabulary of {vocab_size} ids is beyond the {2**24} that three bytes can tell apart: the output "
            "distribution cannot be kept; use --targets hidden,attention"
        )
    return tuple(plane for place, plane in enumerate(_PLANES) if place == 0 or vocab_size > 256**place)


def split_ids(ids: NDArray[np.integer[Any]], vocab_size: int) -> dict[str, NDArray[np.uint8]]:
    """Ids below `vocab_size` as planes of one byte."""
    return {
        plane: np.ascontiguousarray(ids >> 8 * place).astype(np.uint8)
        for place, plane in enumerate(id_planes(vocab_size))
    }


def _join_ids(coded: Mapping[str, torch.Tensor], vocab_size: int) -> torch.Tensor:
    import torch

    ids = coded["ids/low"].to(torch.int64)
    for place, plane in enumerate(id_planes(vocab_size)[1:], 1):
        ids = ids | coded[f"ids/{plane}"].to(torch.int64) << 8 * place
    return ids


def _byte_array(name: str, components: int) -> CodedArraySpec:
    return CodedArraySpec(name=name, dtype="uint8", components=components)
