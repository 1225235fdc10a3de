"""Raw teacher outputs -> the arrays of one block.

`BlockTargets` collects what the passes over a block give, batch by batch and view by view, already coded, so that a
block costs memory for its coded form only. Logits exist for a bounded number of positions at a time. Padding is written
as zeros: it is excluded from every loss, and what a teacher computes there would only cost space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codec import LogProbabilityCodec, make_codec
from teacher_cache.contract import Manifest
from teacher_cache.errors import TeacherError
from teacher_cache.layout import VectorStream, block_arrays, vector_streams
from teacher_cache.packing import pack_codes
from teacher_cache.passes import TeacherPass, stream_values
from teacher_cache.transform import Quantiser

_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Logits held at a time (64 MiB and 1 GiB in float32): on the CPU 67 positions of a 250,002-id vocabulary."""

_IN_CACHE = 2**18
"""Logits that are turned into probabilities at a time on a CPU (1 MiB in float32)."""
_SMALL = -80.0
"""Log of the mass below which float32 sums of exponentials lose digits (the smallest normal number is e^-87)."""


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
    if logits_PV.device.type == "cpu" and len(logits_PV) > (rows := max(1, _IN_CACHE // logits_PV.shape[1])):
        # several passes over few rows stay in the processor's cache: more than twice as fast
        parts = [topk_log_probabilities(part_PV, entries, temperature) for part_PV in logits_PV.split(rows)]
        return TopkTargets(
            ids_PK=torch.cat([part.ids_PK for part in parts]),
            log_probs_PK=torch.cat([part.log_probs_PK for part in parts]),
            log_tail_P=torch.cat([part.log_tail_P for part in parts]),
        )
    scaled_PV = logits_PV.to(torch.float32)
    if temperature != 1.0:
        scaled_PV = scaled_PV / temperature
    values_PK, ids_PK = torch.topk(scaled_PV, entries, dim=1)
    # the largest value first: differences of large logits would lose the digits that a sure prediction lives in
    shifted_PV = scaled_PV - values_PK[:, :1]
    powers_PV = shifted_PV.exp()
    total_P1 = powers_PV.sum(dim=1, keepdim=True).log()
    log_tail_P = powers_PV.scatter_(1, ids_PK, 0).sum(dim=1).log() - total_P1[:, 0]
    lost_P = log_tail_P < _SMALL
    if entries < logits_PV.shape[1] and bool(lost_P.any()):
        others_PV = shifted_PV[lost_P].scatter(1, ids_PK[lost_P], float("-inf"))
        log_tail_P[lost_P] = torch.logsumexp(others_PV, dim=1) - total_P1[lost_P, 0]
    return TopkTargets(ids_PK=ids_PK, log_probs_PK=values_PK - values_PK[:, :1] - total_P1, log_tail_P=log_tail_P)


class BlockTargets:
    """The arrays of one block, filled batch by batch.

    `quantisers` has the coding direction of every `nmse` stream by path. Their codes are collected two bytes a value
    and packed by `finish`, which needs no teacher and may run in another thread.
    """

    def __init__(self, manifest: Manifest, quantisers: Mapping[str, Quantiser]) -> None:
        self.manifest = manifest
        self.streams = vector_streams(manifest)
        self.quantisers = quantisers
        self.arrays: dict[str, NDArray[np.generic]] = {
            spec.path: np.zeros(spec.block_shape, dtype=spec.dtype)
            for spec in block_arrays(manifest)
            if "/escapes/" not in spec.path
        }
        self._codes = {
            stream.path: np.zeros((stream.width, self._tokens(stream)), dtype=np.int16)
            for stream in self.streams
            if stream.calibration is not None
        }

    def _tokens(self, stream: VectorStream) -> int:
        return self.manifest.views_of(stream.view) * self.manifest.block_rows * self.manifest.seq_len

    def put_rows(self, path: str, values: NDArray[np.generic], first: int = 0) -> None:
        """Store per-row values, such as token ids, from row `first` on, unless an earlier group holds them."""
        if path in self.arrays:
            self.arrays[path][first : first + len(values)] = values

    def put_vectors(self, one: TeacherPass) -> None:
        """Code the hidden states and attention vectors of a pass."""
        start = (one.masked_view * self.manifest.block_rows + one.first) * self.manifest.seq_len
        for stream in self.streams:
            if stream.view == one.view:
                self._put_stream(stream, start, stream_values(stream, one.outputs), ~one.real_BT)

    def _put_stream(self, stream: VectorStream, start: int, values_BTD: torch.Tensor, padding_BT: torch.Tensor) -> None:
        part = slice(start, start + padding_BT.numel())
        if stream.path in self._codes:
            codes_DN = self.quantisers[stream.path].quantise(values_BTD.flatten(0, 1))
            self._codes[stream.path][:, part] = codes_DN.masked_fill_(padding_BT.flatten(), 0).cpu().numpy()
            return
        values_ND = values_BTD.masked_fill(padding_BT[:, :, None], 0).flatten(0, 1)
        for name, values in make_codec(stream.codec).encode(values_ND).items():
            self.arrays[f"{stream.path}/{name}"][..., part] = values

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

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Pack what is still unpacked; returns every array of the block. Call once.

        Raises:
            TeacherError: more values are beyond their packing than there is room for.
        """
        for stream in self.streams:
            if stream.calibration is not None:
                self._pack(stream, self._codes.pop(stream.path))
        return self.arrays

    def _pack(self, stream: VectorStream, codes_DN: NDArray[np.int16]) -> None:
        assert stream.calibration is not None
        specs = {spec.path: spec for spec in block_arrays(self.manifest)}
        for name in ("count", "index", "value"):
            spec = specs[f"{stream.path}/escapes/{name}"]
            self.arrays[spec.path] = np.zeros(spec.block_shape, dtype=spec.dtype)
        count_W, index_WE, value_WE = (self.arrays[f"{stream.path}/escapes/{n}"] for n in ("count", "index", "value"))
        room = index_WE.shape[1]
        for view, codes in enumerate(np.split(codes_DN, len(count_W), axis=1)):
            packed = pack_codes(codes, stream.calibration.components)
            found = len(packed.escape_index)
            if found > room:
                raise TeacherError(
                    f"{stream.path} has {found} values in one block beyond what calibration saw, room is for {room}: "
                    "these rows are unlike the first ones of the corpus, and cut-off targets would ruin training; "
                    "raise --max-rows if calibration had few rows, or use --precision int8"
                )
            for name, values in packed.packed.items():
                target = self.arrays[f"{stream.path}/codes/{name}"]
                target[:, view * values.shape[1] : (view + 1) * values.shape[1]] = values
            count_W[view] = found
            index_WE[view, :found] = packed.escape_index
            value_WE[view, :found] = packed.escape_value
