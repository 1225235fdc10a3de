"""Forms in which the distribution after a token may be kept, each as the gradient that it gives. For `causal_codes.py`.

A form says, for P positions, what the gradient of its loss is with respect to a student's logits. All of those compared
here are a multiple of the student's own distribution q, numbers at a few ids, and at most one number at all ids:

    dL/dz = scale_P q + everywhere_P + (values_PK at ids_PK)

so that the gradient of the hidden state, (dL/dz) W, costs no product over the vocabulary but q W, which all forms share
(`hidden_gradient`). What the package's own losses give is written down the same way (`of_targets`); a test compares it
with the losses themselves.

Forms that the store has not, written from their formulas:

- kept entries with the rest left out, sum_K p log(p / q), or spread evenly over all other ids;
- the next token alone, as a draw that is sure;
- `thresholded`, a candidate. With N slots, ids of p >= 1/N are all kept, with p in a byte; any other id is kept with
  probability N p, by systematic sampling (Madow 1949), and counts as 1/N. Each id counts p on average.
- `differences`, another: the same ids with every p in a byte, so that the student can subtract what it expects. With
  h = b q for a b that depends on no draw,

      sum_v (q - h)_v W_v + sum_kept (h - p)_v / pi_v W_v,        pi = min(1, N p)

  is q W - p W on average for any b: the difference estimator of survey sampling (Särndal et al. 1992, 6.3). It varies
  as (h - p)^2, which is little where the student is near its teacher.

In the byte, codes below 4 N are p in quarters of 1/N, the others four for each halving below 1/N. It is rounded up or
down at random so that what an estimate reads, p above 1/N and 1/p below, is right on average.

Shapes: P positions, V vocabulary, K entries, N draws, E width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from torch import Tensor, nn

from student_train.losses.distributions import KeptTargets, SampledTargets, Targets, TopkTargets
from teacher_cache.codecs.logits import split_ids

_QUARTERS, _PER_HALVING = 4, 4
"""Steps of p in each 1 / N, and codes for each halving below."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """dL/dz at P positions of one form, see above."""

    scale_P: Tensor
    ids_PK: Tensor
    values_PK: Tensor
    everywhere_P: Tensor | None = None

    def dense(self, q_PV: Tensor) -> Tensor:
        """[P, V], in plain steps."""
        gradient_PV = self.scale_P[:, None] * q_PV
        if self.everywhere_P is not None:
            gradient_PV = gradient_PV + self.everywhere_P[:, None]
        return gradient_PV.scatter_add(1, self.ids_PK, self.values_PK.to(q_PV.dtype))

    def hidden_gradient(self, expected_PE: Tensor, weight_VE: Tensor) -> Tensor:
        """(dL/dz) W [P, E], given q W."""
        places, entries = self.ids_PK.shape
        rows_PK = torch.arange(places)[:, None].expand(places, entries)
        sparse_PV = torch.sparse_coo_tensor(
            torch.stack([rows_PK.flatten(), self.ids_PK.flatten()]),
            self.values_PK.to(weight_VE.dtype).flatten(),
            (places, len(weight_VE)),
            check_invariants=False,
        )
        gradient_PE = self.scale_P[:, None].to(weight_VE.dtype) * expected_PE + torch.sparse.mm(sparse_PV, weight_VE)
        if self.everywhere_P is not None:
            gradient_PE += self.everywhere_P[:, None].to(weight_VE.dtype) * weight_VE.sum(0)
        return gradient_PE


def of_targets(targets: Targets, q_PV: Tensor) -> Gradient:
    """The gradient of the package's own loss for its own targets; all positions real."""
    ids_PK = targets.ids_PK.long()
    if isinstance(targets, SampledTargets):
        counts_PK = targets.counts_PK.to(q_PV.dtype)
        return _against(ids_PK, counts_PK / counts_PK.sum(1, keepdim=True))
    p_PK, q_PK = targets.log_probs_PK.to(q_PV.dtype).exp(), q_PV.gather(1, ids_PK)
    if isinstance(targets, KeptTargets):
        values_PK = q_PK / q_PK.sum(1, keepdim=True) - p_PK / p_PK.sum(1, keepdim=True)
        return Gradient(scale_P=torch.zeros_like(p_PK[:, 0]), ids_PK=ids_PK, values_PK=values_PK)
    assert isinstance(targets, TopkTargets)
    p_rest_P = targets.log_tail_P.to(q_PV.dtype).exp()
    # summed over the others: 1 - sum q would lose what is left beside a sure prediction
    q_rest_P = q_PV.scatter(1, ids_PK, 0).sum(1)
    ratio_P = torch.where(q_rest_P > 0, p_rest_P / q_rest_P, 0)
    mass_P = p_PK.sum(1) + p_rest_P
    return Gradient(scale_P=mass_P - ratio_P, ids_PK=ids_PK, values_PK=ratio_P[:, None] * q_PK - p_PK)


def left_out(ids_PK: Tensor, p_PK: Tensor) -> Gradient:
    """sum_K p log(p / q): nothing is said of the other ids, whose mass is missing from the sum."""
    return Gradient(scale_P=p_PK.sum(1), ids_PK=ids_PK, values_PK=-p_PK)


def spread(ids_PK: Tensor, p_PK: Tensor, vocab_size: int) -> Gradient:
    """The rest of the mass evenly over all other ids."""
    even_P = (1 - p_PK.sum(1)) / (vocab_size - p_PK.shape[1])
    values_PK = even_P[:, None] - p_PK
    return Gradient(scale_P=torch.ones_like(even_P), ids_PK=ids_PK, values_PK=values_PK, everywhere_P=-even_P)


def drawn(ids_PN: Tensor) -> Gradient:
    """Ids drawn with replacement, each as often as it is named; one label is one draw."""
    shares_PN = torch.full(ids_PN.shape, 1 / ids_PN.shape[1], dtype=torch.float32)
    return _against(ids_PN.long(), shares_PN)


def _against(ids_PK: Tensor, p_PK: Tensor) -> Gradient:
    return Gradient(scale_P=torch.ones_like(p_PK[:, 0]), ids_PK=ids_PK, values_PK=-p_PK)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Ids of a thresholded sample [P, K], filled up with id 0 where `real_PK` is False, and p as its byte has it."""

    slots: int
    ids_PK: Tensor
    p_PK: Tensor
    codes_PK: NDArray[np.uint8]
    real_PK: Tensor

    def gradient(self) -> Gradient:
        """Of `thresholded`: an id counts p, or 1 / N where that is more."""
        return _against(self.ids_PK, torch.where(self.real_PK, self.p_PK.clamp_min(1 / self.slots), 0))

    def differences(self, q_PV: Tensor, share: float) -> Gradient:
        """Of `differences`, with b = `share`."""
        weight_PK = torch.where(self.real_PK, 1 / (self.slots * self.p_PK).clamp_max(1), 0)
        counts_PK = torch.where(self.real_PK, self.p_PK.clamp_min(1 / self.slots), 0)
        values_PK = share * q_PV.gather(1, self.ids_PK) * weight_PK - counts_PK
        scale_P = torch.full((len(q_PV),), 1 - share)
        return Gradient(scale_P=scale_P, ids_PK=self.ids_PK, values_PK=values_PK)

    def bytes(self, vocab_size: int, *, every_p: bool) -> int:
        """Of a count of ids a place, the ids as the store has them, and the byte of p, compressed one by one.

        Without `every_p` only ids of p >= 1 / N have theirs, all others the same.
        """
        real_PK = self.real_PK.numpy()
        gaps_PK = np.diff(self.ids_PK.numpy(), axis=1, prepend=0)
        codes_PK = self.codes_PK if every_p else np.minimum(self.codes_PK, _QUARTERS * self.slots)
        planes = split_ids(gaps_PK[real_PK], vocab_size)
        return compressed((real_PK.sum(1), codes_PK[real_PK], *planes.values()))


def joined(parts: list[Kept]) -> Kept:
    """One sample of all positions, each part filled up to the widest."""
    width = max(part.ids_PK.shape[1] for part in parts)
    ids_PK, p_PK, real_PK, codes_PK = (
        torch.cat([nn.functional.pad(values, (0, width - values.shape[1])) for values in each])
        for each in zip(
            *((part.ids_PK, part.p_PK, part.real_PK, torch.from_numpy(part.codes_PK)) for part in parts), strict=True
        )
    )
    return Kept(slots=parts[0].slots, ids_PK=ids_PK, p_PK=p_PK, codes_PK=codes_PK.numpy(), real_PK=real_PK)


def compressed(arrays: Iterable[NDArray[Any]]) -> int:
    """Bytes of arrays of small numbers, a byte each, as zstd leaves them."""
    return sum(len(Zstd(level=1).encode(np.ascontiguousarray(array, dtype=np.uint8))) for array in arrays)


def keep(p_PV: Tensor, slots: int, random: np.random.Generator) -> Kept:
    """A thresholded sample: each id with probability min(1, N p), ascending."""
    chances_PV = (slots * p_PV).clamp_max(1).to(torch.float64)
    start_P1 = torch.from_numpy(random.random((len(p_PV), 1)))
    passed_PV = (chances_PV.cumsum(1) + start_P1).floor()
    taken_PV = torch.diff(passed_PV, dim=1, prepend=start_P1.floor()) > 0
    # what is certain must not be lost to the rounding of a long sum
    taken_PV |= chances_PV >= 1
    rows_E, ids_E = taken_PV.nonzero(as_tuple=True)
    count_P = taken_PV.sum(1)
    real_PK = torch.arange(int(count_P.max())) < count_P[:, None]
    ids_PK = torch.zeros(real_PK.shape, dtype=torch.long)
    ids_PK[real_PK] = ids_E
    codes_PK = np.zeros(real_PK.shape, dtype=np.uint8)
    codes_PK[real_PK.numpy()] = code_probabilities(p_PV[rows_E, ids_E].numpy(), slots, random)
    p_PK = torch.from_numpy(read_probabilities(codes_PK, slots)).float()
    return Kept(slots=slots, ids_PK=ids_PK, p_PK=p_PK, codes_PK=codes_PK, real_PK=real_PK)


def code_probabilities(p_E: NDArray[np.floating], slots: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """A byte each, for up to 32 slots; the smallest p that it can stand for is 2^-31 of 1 / N."""
    p_E = np.clip(p_E.astype(np.float64), 2.0**-30 / slots, 1.0)
    above_E, most = p_E * slots >= 1, _QUARTERS * slots
    places_E = np.where(above_E, _QUARTERS * (slots * p_E - 1), most - _PER_HALVING * np.log2(p_E * slots))
    low_E = np.where(above_E, np.minimum(np.floor(places_E), most - _QUARTERS - 1), np.floor(places_E))
    here_E, next_E, wanted_E = (
        np.where(above_E, one_E, 1 / one_E)
        for one_E in (read_probabilities(low_E, slots), read_probabilities(low_E + 1, slots), p_E)
    )
    on_E = random.random(len(low_E)) < (wanted_E - here_E) / (next_E - here_E)
    codes: NDArray[np.uint8] = (low_E + on_E).astype(np.uint8)
    return codes


def read_probabilities(codes: NDArray[np.generic], slots: int) -> NDArray[np.float64]:
    """What the bytes stand for."""
    codes_F, most = codes.astype(np.float64), _QUARTERS * slots
    return np.where(codes_F < most, 1 + codes_F / _QUARTERS, 2 ** ((most - codes_F) / _PER_HALVING)) / slots
