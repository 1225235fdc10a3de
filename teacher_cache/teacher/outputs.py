"""What one pass of a teacher gives, whatever ran it. What a build keeps is taken from here and from nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.streams import VectorStream


@dataclass(frozen=True, kw_only=True)
class TeacherOutputs:
    """What one forward pass gives: hidden states [B, T, D] and attention vectors by layer, and the final states."""

    hidden: dict[int, torch.Tensor]
    attention: dict[int, AttentionVectors]
    final_BTD: torch.Tensor


def stream_values(stream: VectorStream, outputs: TeacherOutputs) -> torch.Tensor:
    """What a stream keeps of a pass, [B, T, D]."""
    if stream.source == "hidden":
        return outputs.hidden[stream.layer]
    values: torch.Tensor = getattr(outputs.attention[stream.layer], f"{stream.source}_BTD")
    return values
