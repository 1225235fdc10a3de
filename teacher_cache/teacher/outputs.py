"""What one pass of a teacher gives, whatever ran it. What a build keeps is taken from here and from nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.streams import VectorStream
from teacher_cache.models.attention import relation_matrices

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class TeacherOutputs:
    """What one forward pass gives: hidden states [B, T, D] and attention vectors by layer, and the final states.

    `given` has by layer what the projections of its attention read, [B, T, D], of the layers that were watched.
    """

    hidden: dict[int, torch.Tensor]
    attention: dict[int, AttentionVectors]
    final_BTD: torch.Tensor
    given: dict[int, torch.Tensor] = field(default_factory=dict)


def stream_values(
    stream: VectorStream, outputs: TeacherOutputs, real_BT: torch.Tensor, rows: slice = _ALL
) -> torch.Tensor:
    """What a stream keeps of a pass, or of some rows of it, [B, T, D]; `real_BT` is False at padding."""
    if stream.source == "hidden":
        return outputs.hidden[stream.layer][rows]
    if stream.source == "given":
        return outputs.given[stream.layer][rows]
    vectors_BTD: torch.Tensor = getattr(outputs.attention[stream.layer], f"{stream.source}_BTD")[rows]
    if stream.relation_heads is None:
        return vectors_BTD
    return relation_matrices(vectors_BTD, stream.relation_heads, real_BT[rows]).transpose(1, 2).flatten(2)
