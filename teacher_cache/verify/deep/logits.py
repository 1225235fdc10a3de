"""The output distribution: what is decoded beside what the teacher gives at the same masked positions.

Ids must be the most probable ones (but for ties that arithmetic decides), probabilities within what their codec
declares. Each drawn id must lie where its point falls in the cumulative distribution.

Shapes: T positions, P masked positions of a row, V vocabulary, K entries, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from teacher_cache.codecs.logits import LogProbabilityCodec
from teacher_cache.codecs.sparse_logits import sample_points
from teacher_cache.contract.batch import SampledLogits, TopkLogits
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import LogitsSpec
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.verify.deep.rows import DeepRow
from teacher_cache.verify.deep.tolerance import LargestError, TargetCheck, arithmetic

_LOGITS_AT_ONCE = 2**22
_COARSEST = 0.17
"""Relative error of a probability in `root8`, down to 1e-8."""


class _Distribution:
    """What is common to both forms of the output distribution: log-probabilities of both runs, some places at a time.

    They come from the head as it is, normalised in float64.
    """

    def __init__(self, manifest: Manifest, spec: LogitsSpec, teacher: Teacher) -> None:
        self.manifest = manifest
        self.spec = spec
        self.teacher = teacher
        self.dtype = manifest.dtype

    def parts(self, row: DeepRow) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Places [P], and log-probabilities [P, V] of the row among others and alone."""
        masked = row.targets.places
        assert masked is not None
        place_P = masked.real_BM()[0].nonzero()[:, 0]
        positions_P = masked.positions_BM[0][place_P]
        at_once = max(1, _LOGITS_AT_ONCE // self.manifest.teacher.vocab_size)
        for part_P, at_P in zip(place_P.split(at_once), positions_P.split(at_once), strict=True):
            live_PV, alone_PV = (self._log_probs(run.final_BTD[0], at_P) for run in (row.live, row.alone))
            yield part_P, live_PV, alone_PV

    def known(self, ids_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, all of them within the vocabulary, and where they were not."""
        last = self.manifest.teacher.vocab_size - 1
        return ids_PK.clamp(0, last), (ids_PK < 0) | (ids_PK > last)

    def _log_probs(self, final_TD: torch.Tensor, positions_P: torch.Tensor) -> torch.Tensor:
        logits_PV = self.teacher.head()(final_TD.to(self.teacher.device)[positions_P.to(self.teacher.device)])
        return (logits_PV.double() / self.manifest.temperature).log_softmax(dim=1).cpu()


class TopkComparison(_Distribution):
    """The most probable ids: that they are those, their probabilities and the mass outside them."""

    def __init__(self, manifest: Manifest, spec: LogitsSpec, teacher: Teacher) -> None:
        super().__init__(manifest, spec, teacher)
        self.ids = LargestError("logits ids", "log p below the K-th")
        self.probabilities = LargestError("logits probabilities", "largest |p - p'|")
        self.tail = LargestError("logits tail", "largest |p - p'|")

    def add(self, row: DeepRow) -> None:
        logits = row.targets.logits
        assert isinstance(logits, TopkLogits)
        for place_P, live_PV, alone_PV in self.parts(row):
            ids_PK, foreign_PK = self.known(logits.ids_BMK[0][place_P])
            live_PK, alone_PK = live_PV.gather(1, ids_PK), alone_PV.gather(1, ids_PK)
            noise_PK = (alone_PK - live_PK).abs()
            allowed = arithmetic(noise_PK, float(live_PV[live_PV.isfinite()].abs().amax()), self.dtype)
            last_P1 = live_PV.topk(ids_PK.shape[1], dim=1).values[:, -1:]
            below_PK = (last_P1 - live_PK).clamp_min(0)
            # an id that stands twice has taken the place of another
            below_PK[:, 1:][ids_PK.sort(dim=1).values.diff(dim=1) == 0] = torch.inf
            below_PK[foreign_PK] = torch.inf
            self.ids.add(below_PK, 0.0, noise_PK, 2 * allowed)
            have_PK = logits.log_probs_BMK[0][place_P].double()
            bound_PK = self._bound(live_PK)
            self._compare(self.probabilities, have_PK, live_PK, alone_PK, bound_PK, allowed)
            live_P, alone_P = (values.scatter(1, ids_PK, -torch.inf).logsumexp(dim=1) for values in (live_PV, alone_PV))
            have_P = logits.log_tail_BM[0][place_P].double()
            self._compare(self.tail, have_P, live_P, alone_P, self._bound_tail(live_P), allowed)

    def _bound(self, log_probs: torch.Tensor) -> torch.Tensor:
        half = LogProbabilityCodec("float16").error_bound(log_probs)
        return (
            half if self.spec.codec == "float16" else half + LogProbabilityCodec(self.spec.codec).error_bound(log_probs)
        )

    def _bound_tail(self, log_tail: torch.Tensor) -> torch.Tensor:
        """Entries that a derived store has dropped are in the tail as they were coded, and nothing says how many."""
        bound = 2 * LogProbabilityCodec("float16").error_bound(log_tail)
        if self.spec.codec != "float16":
            return bound + _COARSEST * log_tail.exp() + 1e-6
        # each was off by 2^-11 of its own logarithm, which most of all are if they share the mass evenly
        others = math.log(max(1, self.manifest.teacher.vocab_size - self.spec.entries))
        return bound + log_tail.exp() * torch.expm1(2.0**-11 * (others - log_tail.clamp_min(-1e3)))

    def _compare(
        self,
        errors: LargestError,
        have: torch.Tensor,
        live: torch.Tensor,
        alone: torch.Tensor,
        bound: torch.Tensor,
        allowed: float,
    ) -> None:
        """Logarithms, compared as probabilities."""
        probability = live.exp()
        noise = (alone.exp() - probability).abs()
        errors.add((have.exp() - probability).abs(), bound, noise, probability * float(np.expm1(allowed)))

    def results(self) -> list[TargetCheck]:
        return [self.ids.result(), self.probabilities.result(), self.tail.result()]


class DrawComparison(_Distribution):
    """Drawn ids: each must lie where its point falls in the cumulative distribution."""

    def __init__(self, manifest: Manifest, spec: LogitsSpec, teacher: Teacher) -> None:
        super().__init__(manifest, spec, teacher)
        self.errors = LargestError("logits draws", "mass off their share")

    def add(self, row: DeepRow) -> None:
        logits = row.targets.logits
        assert isinstance(logits, SampledLogits)
        for place_P, live_PV, alone_PV in self.parts(row):
            ids_PK, foreign_PK = self.known(logits.ids_BMK[0][place_P])
            counts_PK = logits.counts_BMK[0][place_P].masked_fill(foreign_PK, 0)
            end_PV, alone_end_PV = live_PV.exp().cumsum(dim=1), alone_PV.exp().cumsum(dim=1)
            noise_PV = (alone_end_PV - end_PV).abs()
            # what logarithms may be off, sums of probabilities may be
            finite_PV = live_PV.isfinite()
            off = arithmetic((alone_PV - live_PV)[finite_PV].abs(), float(live_PV[finite_PV].abs().amax()), self.dtype)
            row_id_P = row.targets.row_id_B.expand(len(place_P)).numpy()
            points_PN = torch.from_numpy(
                sample_points(self.manifest.seed, row_id_P, row.masked_view, place_P.numpy(), self.spec.entries)
            )
            for point_N, id_K, count_K, end_V in zip(points_PN, ids_PK, counts_PK, end_PV, strict=True):
                drawn_N = id_K.repeat_interleave(count_K)
                if len(drawn_N) != len(point_N):
                    off_N = torch.full_like(point_N, torch.inf)
                else:
                    start_N = end_V[drawn_N] - end_V.diff(prepend=torch.zeros(1, dtype=end_V.dtype))[drawn_N]
                    off_N = torch.maximum(start_N - point_N, point_N - end_V[drawn_N]).clamp_min(0)
                self.errors.add(off_N, 0.0, noise_PV, float(np.expm1(off)))

    def results(self) -> list[TargetCheck]:
        return [self.errors.result()]
