"""Raw teacher outputs -> the arrays of one block.

`BlockTargets` collects what the passes over a block give, batch by batch and view by view, already coded, so that a
block costs memory for its coded form only. Logits exist for a bounded number of positions at a time. Padding is written
as zeros: it is excluded from every loss, and what a teacher computes there would only cost space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.batch import AttentionVectors
from teacher_cache.codec import Coded, LogProbabilityCodec, make_codec
from teacher_cache.contract import Manifest, View
from teacher_cache.layout import VectorStream, block_arrays, vector_streams

_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Logits held at a time (64 MiB and 1 GiB in float32): on the CPU 67 positions of a 250,002-id vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TopkTargets:
    """[P, K] ids and log-probabilities, most probable first, and the log of the mass outside them [P]."""

    ids_PK: torch.Tensor
    log_probs_PK: torch.Tensor
    log_tail_P: torch.Tensor


def topk_log_probabilities(logits_PV: torch.Tensor, entries: int, temperature: float) -> TopkTargets:
    """The `entries` largest log-softmax values at this temperature, and the log of the rest of the mass.

    The tail is summed over the other ids, not taken as 1 - sum(p): the difference of nearly equal numbers would lose
    it. One exponential per logit; where the whole tail is below the smallest float32 it is computed again by
    log-sum-exp.
    """
    scaled_PV = logits_PV.to(torch.float32)
    if temperature != 1.0:
        scaled_PV = scaled_PV / temperature
    values_PK, ids_PK = torch.topk(scaled_PV, entries, dim=1)
    # the largest value first: differences of large logits would lose the digits that a sure prediction lives in
    shifted_PV = scaled_PV - values_PK[:, :1]
    powers_PV = shifted_PV.exp()
    total_P1 = powers_PV.sum(dim=1, keepdim=True).log()
    log_tail_P = powers_PV.scatter_(1, ids_PK, 0).sum(dim=1).log() - total_P1[:, 0]
    lost_P = torch.isneginf(log_tail_P)
    if entries < logits_PV.shape[1] and bool(lost_P.any()):
        others_PV = shifted_PV[lost_P].scatter(1, ids_PK[lost_P], float("-inf"))
        log_tail_P[lost_P] = torch.logsumexp(others_PV, dim=1) - total_P1[lost_P, 0]
    return TopkTargets(ids_PK=ids_PK, log_probs_PK=values_PK - values_PK[:, :1] - total_P1, log_tail_P=log_tail_P)


class BlockTargets:
    """The arrays of one block, filled batch by batch."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.streams = vector_streams(manifest)
        self.arrays: dict[str, NDArray[np.generic]] = {
            spec.path: np.zeros(spec.block_shape, dtype=spec.dtype) for spec in block_arrays(manifest)
        }

    def put_rows(self, path: str, values: NDArray[np.generic], first: int = 0) -> None:
        """Store per-row values, such as token ids, from row `first` on."""
        self.arrays[path][first : first + len(values)] = values

    def put_vectors(
        self,
        view: View,
        masked_view: int,
        first: int,
        real_BT: torch.Tensor,
        hidden: dict[int, torch.Tensor],
        attention: dict[int, AttentionVectors],
    ) -> None:
        """Code the hidden states and attention vectors of rows `first`, `first` + 1, … in one view."""
        positions = self.manifest.seq_len
        start = (masked_view * self.manifest.block_rows + first) * positions
        for stream in self.streams:
            if stream.view == view:
                values_BTD = _stream_values(stream, hidden, attention)
                values_ND = values_BTD.masked_fill(~real_BT[:, :, None], 0).flatten(0, 1)
                self._put_coded(stream.path, start, make_codec(stream.codec).encode(values_ND))

    def put_logits(
        self,
        masked_view: int,
        first: int,
        real_BM: torch.Tensor,
        final_BMD: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Code the distribution at the masked positions of rows `first`, …, a bounded number of positions at a time.

        Only real places go through the head; `final_BMD` are final hidden states at the M places.
        """
        spec = self.manifest.targets.logits
        assert spec is not None
        codec = LogProbabilityCodec(spec.codec)
        start = (masked_view * self.manifest.block_rows + first) * self.manifest.masked_per_row
        places_P = real_BM.flatten().nonzero()[:, 0]
        if not len(places_P):
            return
        final_PD = final_BMD.flatten(0, 1)[places_P]
        at_once = max(1, _LOGITS_AT_ONCE.get(final_PD.device.type, 2**28) // self.manifest.teacher.vocab_size)
        chunks = max(1, -(-len(places_P) // at_once))
        for chunk_P, chunk_PD in zip(places_P.tensor_split(chunks), final_PD.tensor_split(chunks), strict=True):
            topk = topk_log_probabilities(head(chunk_PD), spec.entries, self.manifest.temperature)
            columns = start + chunk_P.cpu().numpy()
            self.arrays["logits/ids"][:, columns] = topk.ids_PK.T.cpu().numpy()
            self.arrays["logits/log_tail"][columns] = topk.log_tail_P.cpu().numpy()
            for name, values in codec.encode(topk.log_probs_PK).items():
                self.arrays[f"logits/log_probs/{name}"][..., columns] = values

    def _put_coded(self, path: str, start: int, coded: Coded) -> None:
        for name, values in coded.items():
            self.arrays[f"{path}/{name}"][..., start : start + values.shape[-1]] = values


def _stream_values(
    stream: VectorStream, hidden: dict[int, torch.Tensor], attention: dict[int, AttentionVectors]
) -> torch.Tensor:
    if stream.source == "hidden":
        return hidden[stream.layer]
    values: torch.Tensor = getattr(attention[stream.layer], f"{stream.source}_BTD")
    return values
