"""Attention vectors as distillation sees them: recomputed from a hidden state, and split into relation heads.

Pure tensor functions. Shapes: B rows, T positions, D width, A relation heads, d = D / A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear map of an attention layer: weight [D_out, D_in] and bias [D_out]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionProjections:
    """The three linear maps from a layer's input to its queries, keys and values."""

    query: Projection
    key: Projection
    value: Projection

    def to(self, device: torch.device | str) -> AttentionProjections:
        """The same projections on another device."""
        moved = {
            name: Projection(weight=getattr(self, name).weight.to(device), bias=getattr(self, name).bias.to(device))
            for name in VECTORS
        }
        return AttentionProjections(**moved)


def project_hidden(hidden_BTD: torch.Tensor, projections: AttentionProjections) -> AttentionVectors:
    """Queries, keys and values of a layer whose attention reads `hidden_BTD` itself."""
    query, key, value = (
        linear(hidden_BTD, getattr(projections, name).weight, getattr(projections, name).bias) for name in VECTORS
    )
    return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)


def relation_matrices(
    vectors_BTD: torch.Tensor, heads: int, real_BT: torch.Tensor, visible_BTT: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, A, T, T]: how each real position relates to each, softmax(x x^T / sqrt(d)) in float32; 0 at padding.

    MiniLMv2, equations 2 to 4. `visible_BTT`, [B or 1, T, T], is False where a position is not in another's softmax.
    """
    vectors_BATd = split_relation_heads(vectors_BTD.float(), heads)
    logits_BATT = vectors_BATd @ vectors_BATd.transpose(-1, -2) / math.sqrt(vectors_BATd.shape[-1])
    if visible_BTT is not None:
        logits_BATT = logits_BATT.masked_fill_(~visible_BTT[:, None], -torch.inf)
    matrices_BATT = logits_BATT.masked_fill_(~real_BT[:, None, None, :], -torch.inf).softmax(-1)
    return matrices_BATT.masked_fill_(~real_BT[:, None, :, None], 0)


def split_relation_heads(vectors_BTD: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, D] -> [B, A, T, d]: the concatenated heads cut into `heads` relation heads (MiniLMv2, section 3.1).

    Raises:
        SettingsError: `heads` does not divide D.
    """
    rows, positions, width = vectors_BTD.shape
    if heads < 1 or width % heads:
        raise SettingsError(
            f"{heads} relation heads do not divide the width {width}: every head must get the same number of "
            "components; choose --relation-heads among the common divisors of both widths"
        )
    return vectors_BTD.view(rows, positions, heads, width // heads).transpose(1, 2)
