"""The methods that read the student's logits at the places of a view: `od`, `mlm` and `lm`.

Places are the masked positions of a masked LM, and positions of a causal one whose next token counts. `od` learns the
teacher's distribution there, `mlm` the tokens that were masked, `lm` the next tokens; `od+mlm` and `od+lm` are
distillation with hard labels mixed in. A causal student may have its vocabulary padded to another size than its
teacher: what the teacher says of ids that the student has not got is left out. Each says what it compares the logits
with (`targets`), and `logits_losses` computes the losses of all of them from one pass of the student's head over each
view, without ever holding all logits (see `losses/vocabulary.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from student_train.losses.distributions import KeptTargets, SampledTargets, Targets, TopkTargets, within_vocabulary
from student_train.losses.sums import LossSum
from student_train.losses.vocabulary import LogitsTerm, projected_losses, recomputed_losses
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from teacher_cache.contract.batch import Batch, SampledLogits, TargetBatch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import LogitsForm, View
from teacher_cache.errors import SettingsError
from teacher_cache.models.heads import LMHead

TopkLoss = Literal["tail", "renormalise"]


@dataclass(frozen=True, kw_only=True)
class DistributionTransfer:
    """`od`: the teacher's distribution at the places of a view: its most probable ids, or draws from it."""

    view: View
    form: LogitsForm
    topk_loss: TopkLoss
    vocab_size: int
    temperature: float
    lacks_ids: bool = False
    """Whether the cache may name ids that the student has not got."""
    counted: Counted = "places"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(logits=True)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(head=view == self.view)

    def targets(self, batch: TargetBatch) -> Targets:
        """What the logits are compared with at all places of a batch."""
        targets = flat_targets(batch, self.topk_loss)
        return within_vocabulary(targets, self.vocab_size) if self.lacks_ids else targets

    def describe(self) -> dict[str, Any]:
        loss = self.topk_loss if self.form == "topk" else "counts"
        return {"form": self.form, "loss": loss, "temperature": self.temperature, "view": self.view}


@dataclass(frozen=True, kw_only=True)
class TokenPrediction:
    """`mlm`: the cross-entropy of the tokens that stood at the masked positions; `lm`: that of the next tokens.

    The teacher plays no part.
    """

    vocab_size: int
    view: View = "masked"
    temperature: float = 1.0
    lacks_ids: bool = False
    """Whether the cache may name ids that the student has not got."""
    counted: Counted = "places"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(masked=self.view == "masked", next_tokens=self.view == "plain")

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(head=view == self.view)

    def targets(self, batch: TargetBatch) -> Targets:
        """The token of each place, as the only draw from a distribution that is sure of it."""
        places = batch.places
        assert places is not None
        ids_P1 = places.label_ids_BM.reshape(-1, 1)
        targets = SampledTargets(ids_PK=ids_P1, counts_PK=torch.ones_like(ids_P1), real_P=places.real_BM().flatten())
        return within_vocabulary(targets, self.vocab_size) if self.lacks_ids else targets

    def describe(self) -> dict[str, Any]:
        return {"targets": "original ids" if self.view == "masked" else "next ids", "view": self.view}


LogitsMethod = DistributionTransfer | TokenPrediction


def logits_losses(
    methods: Mapping[str, LogitsMethod],
    weights: Mapping[str, float],
    outputs: Mapping[View, StudentOutputs],
    batch: Batch,
) -> dict[str, LossSum]:
    """The unweighted loss of each of the methods, from one pass of the head over each view.

    Losses of the same view must enter what is minimised in the proportion of `weights` (see `projected_losses`).
    """
    losses: dict[str, LossSum] = {}
    for view in dict.fromkeys(method.view for method in methods.values()):
        together = {name: method for name, method in methods.items() if method.view == view}
        real_P = _real_places(batch[view], view)
        terms = [
            LogitsTerm(_at(method.targets(batch[view]), real_P), method.temperature, weights[name])
            for name, method in together.items()
        ]
        totals_N = _losses_of_view(outputs[view], batch[view], real_P, terms, next(iter(together.values())).vocab_size)
        places = batch[view].places
        assert places is not None
        # also those at which the student has none of the ids: the global batch is counted without looking at ids
        losses |= {name: LossSum(total, places.real_BM().sum()) for name, total in zip(together, totals_N, strict=True)}
    return losses


def _real_places(target: TargetBatch, view: View) -> Tensor | None:
    """Which of the B * M places of a causal row are real; None where nearly all are, as of masked positions.

    Of conversations a third may be, and the head would be run at all of them.
    """
    assert target.places is not None
    return target.places.real_BM().flatten().nonzero()[:, 0] if view == "plain" else None


def _at(targets: Targets, places_P: Tensor | None) -> Targets:
    return targets if places_P is None else type(targets)(*(part[places_P] for part in targets))


def _losses_of_view(
    student: StudentOutputs, target: TargetBatch, real_P: Tensor | None, terms: list[LogitsTerm], vocab_size: int
) -> Tensor:
    assert student.head is not None and target.places is not None
    hidden_PD = student.at_places(target.places)
    hidden_PD = hidden_PD if real_P is None else hidden_PD[real_P]
    projection = _whole_projection(student.head)
    if projection is None:
        agree = partial(_most_of_all, device=hidden_PD.device) if _in_pieces(student.head) else None
        return recomputed_losses(student.head, hidden_PD, terms, vocab_size=vocab_size, agree=agree)
    hidden_PE = student.head.before_projection(hidden_PD).to(projection.weight.dtype)
    return projected_losses(hidden_PE, projection.weight, projection.bias, terms)


def _whole_projection(head: LMHead) -> nn.Linear | None:
    """The map that ends the head, where it can be used by itself."""
    # ZeRO 3 keeps parameters in pieces, and gathers them for the module that they belong to while that runs
    return None if _in_pieces(head) else head.projection


def _in_pieces(head: LMHead) -> bool:
    """Whether every process has a part of each weight, so that all of them run the head equally often or wait."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _most_of_all(number: int, *, device: torch.device) -> int:
    """The largest of the numbers that the processes give."""
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def flat_targets(target: TargetBatch, topk_loss: TopkLoss = "tail") -> Targets:
    """The cached distribution at all places of a batch, row after row."""
    logits = target.logits
    assert logits is not None and target.places is not None
    ids_PK, real_P = logits.ids_BMK.flatten(0, 1), target.places.real_BM().flatten()
    if isinstance(logits, SampledLogits):
        return SampledTargets(ids_PK=ids_PK, counts_PK=logits.counts_BMK.flatten(0, 1), real_P=real_P)
    log_probs_PK = logits.log_probs_BMK.flatten(0, 1)
    if topk_loss == "renormalise":
        return KeptTargets(ids_PK=ids_PK, log_probs_PK=log_probs_PK, real_P=real_P)
    return TopkTargets(ids_PK=ids_PK, log_probs_PK=log_probs_PK, log_tail_P=logits.log_tail_BM.flatten(), real_P=real_P)


def make_distribution_transfer(
    manifest: Manifest, student: PreTrainedConfig, topk_loss: TopkLoss = "tail", *, trimmed: bool = False
) -> DistributionTransfer:
    """`od` on a cache that holds the distribution; `trimmed`: the batches are in the student's ids, which are fewer.

    Raises:
        SettingsError: a masked LM has another vocabulary, or the cache has nothing that could be renormalised.
    """
    spec = manifest.targets.logits
    assert spec is not None
    if not trimmed:
        _check_vocabulary("od", manifest, student)
    if topk_loss == "renormalise" and spec.form != "topk":
        raise SettingsError(
            f"--topk-loss {topk_loss!r} does not fit this cache: its logits are ids drawn from the teacher's whole "
            "distribution (--logits sample), whose shares of all draws sum to 1 already, and renormalising the "
            "student's probabilities over the ids that happened to be drawn would spoil their unbiased gradient; leave "
            "--topk-loss out, or build a store with --logits topk"
        )
    return DistributionTransfer(
        view=spec.view,
        form=spec.form,
        topk_loss=topk_loss,
        vocab_size=student.vocab_size,
        temperature=manifest.temperature,
        lacks_ids=student.vocab_size < manifest.teacher.vocab_size,
    )


def make_token_prediction(manifest: Manifest, student: PreTrainedConfig, *, trimmed: bool = False) -> TokenPrediction:
    """`mlm` on a cache that holds a masked view; `trimmed`: as of `make_distribution_transfer`.

    Raises:
        SettingsError: the student has another vocabulary.
    """
    if not trimmed:
        _check_vocabulary("mlm", manifest, student)
    return TokenPrediction(vocab_size=student.vocab_size, lacks_ids=student.vocab_size < manifest.teacher.vocab_size)


def make_next_token_prediction(manifest: Manifest, student: PreTrainedConfig) -> TokenPrediction:
    """`lm` on a cache of a causal teacher."""
    lacks_ids = student.vocab_size < manifest.teacher.vocab_size
    return TokenPrediction(vocab_size=student.vocab_size, view="plain", lacks_ids=lacks_ids)


def _check_vocabulary(method: str, manifest: Manifest, student: PreTrainedConfig) -> None:
    """Numbers of ids alone; `students` has compared what they mean, and causal models pad theirs as they like."""
    if not manifest.teacher.causal and student.vocab_size != manifest.teacher.vocab_size:
        raise SettingsError(
            f"--method {method}: the student has {student.vocab_size} vocabulary entries, the teacher "
            f"{manifest.teacher.vocab_size}: ids and distributions of the cache mean nothing to it; choose a student "
            "with the teacher's vocabulary"
        )
