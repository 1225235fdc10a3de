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
class Replay:
    """What turns queries and keys by their position after projection: r components of each head, by T positions.

    One half of the r components of a head is turned against the other, as Llama does (RoFormer, Su et al., 2021); the
    rest of a head, of `head_width` components, stays as it is.
    """

    head_width: int
    cosine_Tr: torch.Tensor
    sine_Tr: torch.Tensor

    @property
    def rotated(self) -> int:
        """r, the components of a head that are turned."""
        return self.cosine_Tr.shape[1]

    def to(self, device: torch.device | str) -> Replay:
        """The same on another device."""
        return Replay(head_width=self.head_width, cosine_Tr=self.cosine_Tr.to(device), sine_Tr=self.sine_Tr.to(device))

    def turn(self, vectors_BTD: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        """Queries or keys [B, T, D] at these positions."""
        cosine_BT1r, sine_BT1r = self.cosine_Tr[position_BT][:, :, None], self.sine_Tr[position_BT][:, :, None]
        heads_BTAd = vectors_BTD.unflatten(-1, (-1, self.head_width))
        turned_BTAr, rest = heads_BTAd.split([cosine_BT1r.shape[-1], self.head_width - cosine_BT1r.shape[-1]], dim=-1)
        first, second = turned_BTAr.chunk(2, dim=-1)
        turned_BTAr = turned_BTAr * cosine_BT1r + torch.cat([-second, first], dim=-1) * sine_BT1r
        return torch.cat([turned_BTAr, rest], dim=-1).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class AttentionProjections:
    """The three linear maps from a layer's input to its queries, keys and values, and what follows them if any."""

    query: Projection
    key: Projection
    value: Projection
    replay: Replay | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        return len(self.query.bias), len(self.key.bias), len(self.value.bias)

    def to(self, device: torch.device | str) -> AttentionProjections:
        """The same projections on another device."""
        moved = {
            name: Projection(weight=getattr(self, name).weight.to(device), bias=getattr(self, name).bias.to(device))
            for name in VECTORS
        }
        return AttentionProjections(**moved, replay=None if self.replay is None else self.replay.to(device))


def project_hidden(
    hidden_BTD: torch.Tensor, projections: AttentionProjections, position_BT: torch.Tensor | None = None
) -> AttentionVectors:
    """Queries, keys and values of a layer whose projections read `hidden_BTD`.

    `position_BT` says where in its segment each token is, from 0; where nothing turns by positions it has no effect.
    """
    query, key, value = (
        linear(hidden_BTD, getattr(projections, name).weight, getattr(projections, name).bias) for name in VECTORS
    )
    if (replay := projections.replay) is not None:
        if position_BT is None:
            position_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).expand(hidden_BTD.shape[:2])
        query, key = (replay.turn(vectors_BTD, position_BT) for vectors_BTD in (query, key))
    return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)


def restarting_positions(starts_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: each position counted from the start of its segment, the first being 0."""
    positions_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return positions_T - (positions_T * starts_BT).cummax(dim=1).values


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
