"""Losses of attention as pure functions: relations of queries, keys and values of one layer of both models.

In: vectors of all heads side by side, of student and teacher. Out: a `LossSum` over real positions, arithmetic in
float32.

Shapes: B rows, T positions, D width, A relation heads, d = D / A components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from student_train.kernels import relation_kl_sum, stored_relation_kl_sum
from student_train.losses.sums import LossSum
from teacher_cache.contract.batch import AttentionRelations, AttentionVectors
from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import split_relation_heads


def relation_loss(
    student: AttentionVectors,
    teacher: AttentionVectors | AttentionRelations,
    length_B: Tensor,
    *,
    heads: int,
    weights: Sequence[float],
    key_value_heads: int | None = None,
    causal: bool = False,
    starts_BT: Tensor | None = None,
) -> LossSum:
    """Sum over real positions of alpha_q KL_q + alpha_k KL_k + alpha_v KL_v, each the mean over its relation heads.

    MiniLMv2 (Wang et al., Findings of ACL 2021), equation 5, with separate weights for the three relations.

    Args:
        student: the student's vectors of one layer.
        teacher: the teacher's, or their relations.
        length_B: real positions of each row.
        heads: relation heads of queries.
        weights: alpha_q, alpha_k and alpha_v.
        key_value_heads: those of keys and values, which are narrower than queries where several query heads share
            them; as many as of queries if not given.
        causal: relate each position to itself and those before it alone.
        starts_BT: True where a segment begins: positions are related within their segment.
    """
    total = length_B.new_zeros((), dtype=torch.float32)
    for name, weight in zip(VECTORS, weights, strict=True):
        if weight:
            count = heads_of(name, heads, key_value_heads)
            loss = one_relation_loss(name, student, teacher, length_B, heads=count, causal=causal, starts_BT=starts_BT)
            total = total + weight * loss
    return LossSum(total, length_B.sum())


def heads_of(name: str, heads: int, key_value_heads: int | None) -> int:
    """In how many relation heads queries, keys or values are related."""
    return heads if name == VECTORS[0] or key_value_heads is None else key_value_heads


def one_relation_loss(
    name: str,
    student: AttentionVectors,
    teacher: AttentionVectors | AttentionRelations,
    length_B: Tensor,
    *,
    heads: int,
    causal: bool = False,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """Sum over real positions of the KL of the query, key or value relation, the mean over `heads` relation heads.

    Relations that the cache holds as matrices have the heads that they were stored with.
    """
    student_BATd = split_relation_heads(getattr(student, f"{name}_BTD"), heads)
    if isinstance(teacher, AttentionRelations):
        matrices_BATT = getattr(teacher, f"{name}_BATT")
        return stored_relation_kl_sum(matrices_BATT, student_BATd, length_B, causal=causal, starts_BT=starts_BT)
    teacher_BATd = split_relation_heads(getattr(teacher, f"{name}_BTD"), heads)
    return relation_kl_sum(teacher_BATd, student_BATd, length_B, causal=causal, starts_BT=starts_BT)


def vectors_loss(
    student: AttentionVectors,
    teacher: AttentionVectors,
    real_BT: Tensor,
    maps: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    variances: Sequence[float],
    weights: Sequence[float],
    ordinary_BT: Tensor | None = None,
) -> LossSum:
    """Sum over real positions of sum_x alpha_x ||W_x s_x + b_x - t_x||^2 / E||t_x - mean||^2, x being q, k and v.

    DirectMiniLM (Udagawa et al., EMNLP 2023 Industry): what MiniLMv2 relates is matched itself, through learned maps
    from the student's width to the teacher's. In these units the best constant guess costs alpha_q + alpha_k + alpha_v
    per position.

    Args:
        student: the student's vectors of one layer.
        teacher: the teacher's.
        real_BT: True at real positions.
        maps: W_x and b_x by the vector's name, for each whose weight is not 0; they compute in float32.
        variances: E||t_x - mean||^2 over the cache.
        weights: alpha_x.
        ordinary_BT: True at real positions that are no sinks, all if it is not given: the others, which would own the
            variance, add nothing and are counted all the same.
    """
    counted_BT = real_BT if ordinary_BT is None else ordinary_BT
    total = torch.zeros((), device=real_BT.device)
    for name, variance, weight in zip(VECTORS, variances, weights, strict=True):
        if weight:
            student_BTD, teacher_BTD = (getattr(vectors, f"{name}_BTD") for vectors in (student, teacher))
            error_BT = (maps[name](student_BTD) - teacher_BTD).square().sum(-1)
            total = total + weight / variance * torch.where(counted_BT, error_BT, 0).sum()
    return LossSum(total, real_BT.sum())
