"""The distillation methods: what each reads of the student and of the cache, and its loss on a batch.

In: what the student computed for each view (`StudentOutputs`) and the decoded targets of the same rows. Out: one
`LossSum`. A method states which layers of the student and which targets it reads, so that the student's forward pass
computes, and the loader decodes, those and no others. Methods hold settings only; trainable projections are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from student_train.layer_map import LayerPairs
from student_train.losses import (
    LossSum,
    SampledTargets,
    TopkTargets,
    distribution_loss,
    hidden_state_loss,
    relation_loss,
)
from teacher_cache.batch import AttentionVectors, Batch, SampledLogits, TargetBatch, TargetRequest
from teacher_cache.specs import LogitsForm, View


@dataclass(frozen=True, kw_only=True)
class StudentNeeds:
    """What the student's forward pass on one view must give: hidden states, attention vectors, the head's logits."""

    hidden_layers: frozenset[int] = frozenset()
    attention_layers: frozenset[int] = frozenset()
    head: bool = False

    def __or__(self, other: StudentNeeds) -> StudentNeeds:
        return StudentNeeds(
            hidden_layers=self.hidden_layers | other.hidden_layers,
            attention_layers=self.attention_layers | other.attention_layers,
            head=self.head or other.head,
        )

    def __bool__(self) -> bool:
        return bool(self.hidden_layers or self.attention_layers or self.head)


@dataclass(frozen=True, kw_only=True)
class StudentOutputs:
    """What the student computed on one view; `last_hidden_BTD` is what its masked-LM head reads."""

    hidden: Mapping[int, Tensor]
    attention: Mapping[int, AttentionVectors]
    last_hidden_BTD: Tensor
    head: Callable[[Tensor], Tensor] | None = None


class Method(Protocol):
    """One way to learn from the cache."""

    @property
    def request(self) -> TargetRequest:
        """Targets that it reads."""

    def needs(self, view: View) -> StudentNeeds:
        """What it reads of the student's forward pass on `view`."""

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        """Its loss on these rows."""

    def describe(self) -> dict[str, Any]:
        """What a provenance record says about it."""


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """`mha`: attention relations of one teacher layer to one student layer (MiniLMv2)."""

    view: View
    student_layer: int
    teacher_layer: int
    relation_heads: int
    weights: tuple[float, ...]

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(attention_layers=(self.teacher_layer,))

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(attention_layers=frozenset({self.student_layer} if view == self.view else ()))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        target = batch[self.view]
        return relation_loss(
            outputs[self.view].attention[self.student_layer],
            target.attention[self.teacher_layer],
            target.length_B,
            heads=self.relation_heads,
            weights=self.weights,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "student_layer": self.student_layer,
            "teacher_layer": self.teacher_layer,
            "relation_heads": self.relation_heads,
            "weights": list(self.weights),
            "view": self.view,
        }


@dataclass(frozen=True, kw_only=True)
class HiddenTransfer:
    """`hs`: hidden states of mapped layers through one learned linear map per pair."""

    mapping: str
    pairs: LayerPairs
    views: Mapping[int, View]
    variance: Mapping[int, float]

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(hidden_layers=tuple(sorted(self.views)))

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset(i for i, j in self.pairs if self.views[j] == view))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.pairs:
            view = self.views[teacher_layer]
            losses.append(
                hidden_state_loss(
                    outputs[view].hidden[student_layer],
                    batch[view].hidden[teacher_layer],
                    batch[view].real_BT(),
                    projections[projection_name(student_layer, teacher_layer)],
                    self.variance[teacher_layer],
                )
            )
        # every view holds the same rows, so all pairs count the same positions
        return LossSum(torch.stack([loss.total for loss in losses]).sum(), losses[0].count)

    def describe(self) -> dict[str, Any]:
        return {"mapping": self.mapping, "pairs": [list(pair) for pair in self.pairs]}


@dataclass(frozen=True, kw_only=True)
class DistributionTransfer:
    """`od`: the teacher's distribution at masked positions: its head with the tail as one bucket, or draws from it."""

    view: View
    form: LogitsForm
    vocab_size: int
    temperature: float

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(logits=True)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(head=view == self.view)

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        student, target = outputs[self.view], batch[self.view]
        assert student.head is not None and target.masked is not None
        positions_BM1 = target.masked.positions_BM.long().unsqueeze(-1)
        hidden_BMD = student.last_hidden_BTD.take_along_dim(positions_BM1, dim=1)
        return distribution_loss(
            student.head,
            hidden_BMD.flatten(0, 1),
            flat_targets(target),
            vocab_size=self.vocab_size,
            temperature=self.temperature,
        )

    def describe(self) -> dict[str, Any]:
        loss = "tail" if self.form == "topk" else "counts"
        return {"form": self.form, "loss": loss, "temperature": self.temperature, "view": self.view}


def flat_targets(target: TargetBatch) -> TopkTargets | SampledTargets:
    """The cached distribution at all places of a batch, row after row."""
    logits = target.logits
    assert logits is not None and target.masked is not None
    ids_PK, real_P = logits.ids_BMK.flatten(0, 1), target.masked.real_BM().flatten()
    if isinstance(logits, SampledLogits):
        return SampledTargets(ids_PK=ids_PK, counts_PK=logits.counts_BMK.flatten(0, 1), real_P=real_P)
    return TopkTargets(
        ids_PK=ids_PK,
        log_probs_PK=logits.log_probs_BMK.flatten(0, 1),
        log_tail_P=logits.log_tail_BM.flatten(),
        real_P=real_P,
    )


def projection_name(student_layer: int, teacher_layer: int) -> str:
    """Name of the pair's linear map among the objective's projections."""
    return f"student_{student_layer}_teacher_{teacher_layer}"
