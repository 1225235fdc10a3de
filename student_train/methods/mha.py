"""`mha`: relations of queries, keys and values of teacher layers to each other (MiniLMv2).

In: the pairs of layers asked for and what the cache holds, then what the student computed and the decoded targets of
the same rows. Out: one `LossSum` per batch, the sum over the pairs. A cache of vectors serves any number of relation
heads, one of matrices the number it was built with. What a position is related to is what the teacher sees of it: of a
causal teacher, what comes before it, unless asked otherwise, and in rows whose documents do not see each other, its own
document.
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
from student_train.methods.relation_heads import RelationFlags, RelationMask, choose_heads, choose_mask, vector_widths
from teacher_cache.contract.batch import Batch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import View
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """`mha`: attention relations of teacher layers to student layers (MiniLMv2).

    `key_value_heads` are None where keys and values are related in as many heads as queries; `mask` is None where the
    teacher is a masked LM, which sees all of a document.
    """

    pairs: LayerPairs
    views: Mapping[int, View]
    relation_heads: int
    weights: tuple[float, ...]
    key_value_heads: int | None = None
    mask: RelationMask | None = None
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
                    key_value_heads=self.key_value_heads,
                    causal=self.mask == "causal",
                    starts_BT=batch[view].starts_BT,
                )
            )
        return add_losses(losses)

    def describe(self) -> dict[str, Any]:
        said = {"key_value_heads": self.key_value_heads, "relation_mask": self.mask}
        return {
            "relation_heads": self.relation_heads,
            **{name: value for name, value in said.items() if value is not None},
            **describe_pairs(self.pairs, self.weights, self.views),
        }


def make_attention_transfer(
    manifest: Manifest, student: PreTrainedConfig, pairs: LayerPairs, asked: RelationFlags, weights: Sequence[float]
) -> AttentionTransfer:
    """`mha` of these pairs, all of which the cache holds.

    Args:
        manifest: of the cache.
        student: the student's configuration.
        pairs: see `attention_pairs`.
        asked: relation heads and mask, where they are asked for; heads of stored matrices are theirs.
        weights: of the query, key and value relations.

    Raises:
        SettingsError: the heads do not divide both widths, or are not those of stored matrices, or the mask is none
            that such a teacher can have.
    """
    mask = choose_mask(manifest, asked.mask)
    stored = {layer: spec_of(manifest, layer).heads for _, layer in pairs}
    held = {count for count in stored.values() if count is not None}
    if len(held) > 1:
        by_layer = ", ".join(f"{count} at layer {layer}" for layer, count in stored.items() if count is not None)
        raise SettingsError(
            f"the cache holds relations as matrices of different numbers of heads ({by_layer}): relations of one "
            "method are compared in the same heads; name layers of one number with --attention-layer"
        )
    if held:
        asked = _check_stored_heads(*held, asked=asked, student_widths=vector_widths(student))
    heads, key_value_heads = choose_heads(manifest, [layer for _, layer in pairs], student, asked)
    return AttentionTransfer(
        pairs=pairs,
        views=views_of_pairs(manifest, pairs),
        relation_heads=heads,
        weights=tuple(weights),
        key_value_heads=None if key_value_heads == heads else key_value_heads,
        mask=mask,
    )


def _check_stored_heads(stored: int, *, asked: RelationFlags, student_widths: Sequence[int]) -> RelationFlags:
    flags = {"--relation-heads": asked.heads, "--relation-heads-kv": asked.key_value_heads}
    for flag, heads in flags.items():
        if heads not in (None, stored):
            raise SettingsError(
                f"{flag} {heads!r}: the cache holds relations as matrices of {stored} heads, and others cannot be made "
                f"of them; give {flag} {stored}, or build a cache with --relations hidden or qkv"
            )
    undivided = next((width for width in student_widths if width % stored), None)
    if undivided is not None:
        raise SettingsError(
            f"the cache holds relations as matrices of {stored} heads, which do not divide the student's width "
            f"{undivided}: every relation head must get the same number of components; choose a student whose "
            "width they divide, or build a cache with --relations hidden or qkv"
        )
    return RelationFlags(heads=stored, key_value_heads=stored)
