"""`mha`: relations of queries, keys and values of teacher layers to each other (MiniLMv2).

In: the pairs of layers asked for and what the cache holds, then what the student computed and the decoded targets of
the same rows. Out: one `LossSum` per batch, the sum over the pairs. A cache of vectors serves any number of relation
heads, one of matrices the number it was built with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from student_train.layer_map import LayerPairs
from student_train.losses.relations import relation_loss
from student_train.losses.sums import LossSum, add_losses
from student_train.methods.attention_pairs import describe_pairs, needs_of, request_of, spec_of, views_of_pairs
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from teacher_cache.contract.batch import Batch, TargetRequest
from teacher_cache.contract.layers import default_relation_heads
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import View
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """`mha`: attention relations of teacher layers to student layers (MiniLMv2)."""

    pairs: LayerPairs
    views: Mapping[int, View]
    relation_heads: int
    weights: tuple[float, ...]
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return request_of(self.pairs)

    def needs(self, view: View) -> StudentNeeds:
        return needs_of(self.pairs, self.views, view)

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.pairs:
            view = self.views[teacher_layer]
            losses.append(
                relation_loss(
                    outputs[view].attention[student_layer],
                    batch[view].attention[teacher_layer],
                    batch[view].length_B,
                    heads=self.relation_heads,
                    weights=self.weights,
                )
            )
        return add_losses(losses)

    def describe(self) -> dict[str, Any]:
        return {"relation_heads": self.relation_heads, **describe_pairs(self.pairs, self.weights, self.views)}


def make_attention_transfer(
    manifest: Manifest, student: PreTrainedConfig, pairs: LayerPairs, heads: int | None, weights: Sequence[float]
) -> AttentionTransfer:
    """`mha` of these pairs, all of which the cache holds.

    Args:
        manifest: of the cache.
        student: the student's configuration.
        pairs: see `attention_pairs`.
        heads: relation heads; None for those of stored matrices, or else the largest common divisor of both widths up
            to a sixteenth of the teacher's.
        weights: of the query, key and value relations.

    Raises:
        SettingsError: the heads do not divide both widths, or are not those of stored matrices.
    """
    width = student.hidden_size
    stored = {layer: spec_of(manifest, layer).heads for _, layer in pairs}
    held = {count for count in stored.values() if count is not None}
    if len(held) > 1:
        by_layer = ", ".join(f"{count} at layer {layer}" for layer, count in stored.items() if count is not None)
        raise SettingsError(
            f"the cache holds relations as matrices of different numbers of heads ({by_layer}): relations of one "
            "method are compared in the same heads; name layers of one number with --attention-layer"
        )
    if held:
        heads = _check_stored_heads(*held, asked=heads, student_width=width)
    elif heads is None:
        heads = default_relation_heads(manifest.teacher.hidden_size, width)
    _check_relation_heads(heads, manifest.teacher.hidden_size, width)
    return AttentionTransfer(
        pairs=pairs, views=views_of_pairs(manifest, pairs), relation_heads=heads, weights=tuple(weights)
    )


def _check_relation_heads(heads: int, teacher_width: int, student_width: int) -> None:
    if heads >= 1 and teacher_width % heads == 0 and student_width % heads == 0:
        return
    possible = [n for n in range(1, student_width + 1) if teacher_width % n == 0 and student_width % n == 0]
    below = [n for n in possible if n < heads][-1:]
    above = [n for n in possible if n > heads][:1]
    raise SettingsError(
        f"--relation-heads {heads!r} does not divide both the teacher's width {teacher_width} and the student's width "
        f"{student_width}: every relation head must get the same number of components; the nearest that does is "
        f"{' or '.join(map(str, below + above))}"
    )


def _check_stored_heads(stored: int, *, asked: int | None, student_width: int) -> int:
    if asked is not None and asked != stored:
        raise SettingsError(
            f"--relation-heads {asked!r}: the cache holds relations as matrices of {stored} heads, and others cannot "
            f"be made of them; give --relation-heads {stored}, or build a cache with --relations hidden or qkv"
        )
    if student_width % stored:
        raise SettingsError(
            f"the cache holds relations as matrices of {stored} heads, which do not divide the student's width "
            f"{student_width}: every relation head must get the same number of components; choose a student whose "
            "width they divide, or build a cache with --relations hidden or qkv"
        )
    return stored
