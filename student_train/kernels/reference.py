"""The relation loss as the formula stands, for autograd: what the other backends are compared with.

Every [T, T] matrix is materialised, several per head are kept for the backward pass. Padding is masked, and what a
causal mask or the segments of a row leave out; half precision is widened to float32, float64 stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASKED_LOGIT = -1e30
"""Logit of a column that is left out: its exponential is 0 exactly, and unlike -inf it gives no NaN when subtracted."""


def reference_kl_sum(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """Sum of KL_i over heads and real positions."""
    visible_BTT = visible_pairs(student_BATd[:, 0, :, 0], causal, starts_BT)
    log_p_BATT = _log_relation(teacher_BATd.detach(), length_B, visible_BTT)
    log_s_BATT = _log_relation(student_BATd, length_B, visible_BTT)
    kl_BAT = (log_p_BATT.exp() * (log_p_BATT - log_s_BATT)).sum(-1)
    return kl_BAT.sum() if length_B is None else (kl_BAT * real_BT(length_B, kl_BAT.shape[-1])[:, None, :]).sum()


def stored_kl_sum(
    teacher_BATT: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """The same for relations that the teacher's side holds as matrices, 0 at padding.

    Their rows are scaled to add up to 1 again, which float16 does not keep, nor do those of which a part is left out.
    """
    visible_BTT = visible_pairs(student_BATd[:, 0, :, 0], causal, starts_BT)
    log_s_BATT = _log_relation(student_BATd, length_B, visible_BTT)
    p_BATT = teacher_BATT.to(log_s_BATT.dtype)
    if visible_BTT is not None:
        p_BATT = p_BATT * visible_BTT[:, None]
    p_BATT = p_BATT / p_BATT.sum(-1, keepdim=True).clamp_min(torch.finfo(p_BATT.dtype).tiny)
    return (torch.xlogy(p_BATT, p_BATT) - p_BATT * log_s_BATT).sum()


def widen(vectors: Tensor) -> Tensor:
    """What arithmetic is done in: float32, or float64 where that is given."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def real_BT(length_B: Tensor, positions: int) -> Tensor:
    """True at the first `length` positions of each row."""
    return torch.arange(positions, device=length_B.device)[None, :] < length_B[:, None]


def visible_pairs(like_BT: Tensor, causal: bool, starts_BT: Tensor | None) -> Tensor | None:
    """[B or 1, T, T]: True where position j is in the softmax of position i, by segments and causality alone.

    None where all are. `like_BT` says how many positions there are, and where.
    """
    visible_BTT = None
    if starts_BT is not None:
        segment_BT = starts_BT.cumsum(1)
        visible_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    if causal:
        positions = like_BT.shape[1]
        before_TT = torch.ones(positions, positions, dtype=torch.bool, device=like_BT.device).tril()
        visible_BTT = before_TT[None] if visible_BTT is None else visible_BTT & before_TT
    return visible_BTT


def _log_relation(vectors_BATd: Tensor, length_B: Tensor | None, visible_BTT: Tensor | None) -> Tensor:
    vectors_BATd = widen(vectors_BATd)
    logits_BATT = vectors_BATd @ vectors_BATd.transpose(-1, -2) / math.sqrt(vectors_BATd.shape[-1])
    if length_B is not None:
        padding_BT = ~real_BT(length_B, logits_BATT.shape[-1])
        logits_BATT = logits_BATT.masked_fill(padding_BT[:, None, None, :], MASKED_LOGIT)
    if visible_BTT is not None:
        logits_BATT = logits_BATT.masked_fill(~visible_BTT[:, None], MASKED_LOGIT)
    return logits_BATT.log_softmax(-1)
