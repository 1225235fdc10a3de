"""The distillation methods: what each reads of the student and of the cache, and its loss on a batch.

In: what the student computed for each view (`StudentOutputs`) and the decoded targets of the same rows. Out: one
`LossSum`. A method states which layers of the student and which targets it reads, so that the student's forward pass
computes, and the loader decodes, those and no others. Methods hold settings only; trainable projections are handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from student_train.losses.sums import LossSum
from teacher_cache.contract.batch import AttentionVectors, Batch, Places, TargetRequest
from teacher_cache.contract.targets import View
from teacher_cache.models.heads import LMHead

Counted = Literal["positions", "places", "rows"]
"""What a loss is a sum over: real positions, places (masked positions, or those whose next token counts), or rows."""


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
    """What the student computed on one view; `last_hidden_BTD` is what its language-modelling head reads."""

    hidden: Mapping[int, Tensor]
    attention: Mapping[int, AttentionVectors]
    last_hidden_BTD: Tensor
    head: LMHead | None = None

    def at_places(self, places: Places) -> Tensor:
        """Final hidden states [B * M, D] at the places of a batch, row after row; what fills up is position 0."""
        return places.vectors(self.last_hidden_BTD)


@runtime_checkable
class MapsVectors(Protocol):
    """A method whose linear maps lead from vectors of the student to vectors of the teacher, at all positions."""

    def mapped(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name of each map, what it takes and what it should give, at real positions: [N, D_S] and [N, D_T]."""


class Method(Protocol):
    """One way to learn from the cache."""

    @property
    def counted(self) -> Counted:
        """What its loss is a sum over, in the global batch too."""

    @property
    def request(self) -> TargetRequest:
        """Targets that it reads."""

    def needs(self, view: View) -> StudentNeeds:
        """What it reads of the student's forward pass on `view`."""

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        """Its loss on these rows."""

    def describe(self) -> dict[str, Any]:
        """What a provenance record says about it."""
