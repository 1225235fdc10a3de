"""The distillation losses as pure functions of tensors: what the student computed, what the cache holds, a sum.

Every loss returns its sum over the real positions of the batch it was given together with their count, and is divided
by the real positions of the global batch later, so that accumulation and data parallelism do not change it. Arithmetic
is float32 whatever the student computes in. Logits exist for the positions handed in only, and for a bounded number of
them at a time: with 250,002 entries of vocabulary a full [B, T, V] would not fit anywhere.

Shapes: B rows, T positions, D width, A relation heads, P positions of interest, K kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from student_train.kernels.relation import relation_kl_sum, stored_relation_kl_sum
from teacher_cache.batch import AttentionRelations, AttentionVectors
from teacher_cache.relations import VECTORS, split_relation_heads

LOGITS_AT_A_TIME = 1 << 25
"""Logits that exist at once: 128 MiB as float32, and twice that in the course of a pass."""


class LossSum(NamedTuple):
    """A loss summed over positions (differentiable scalar) and the number of positions (int64 scalar).

    A named tuple because DeepSpeed walks through the outputs of the model that it wraps and knows tuples, lists, dicts.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs


class TopkTargets(NamedTuple):
    """The cached distribution at P positions: ids and log-probabilities [P, K], log of the other mass [P], real [P]."""

    ids_PK: Tensor
    log_probs_PK: Tensor
    log_tail_P: Tensor
    real_P: Tensor


class SampledTargets(NamedTuple):
    """Draws from the distribution at P positions: distinct ids and their counts [P, K], real [P].

    Ids of count 0 fill up a position and mean nothing, but are ids.
    """

    ids_PK: Tensor
    counts_PK: Tensor
    real_P: Tensor


def hidden_state_loss(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    real_BT: Tensor,
    projection: Callable[[Tensor], Tensor],
    variance: float,
) -> LossSum:
    """Sum over real positions of ||W h_S + b - h_T||^2 / E||h_T - mean||^2: 1 per position for the best constant guess.

    Args:
        student_BTD: the student's hidden state, of its own width.
        teacher_BTD: the teacher's.
        real_BT: True at real positions.
        projection: the learned map from the student's width to the teacher's, in float32.
        variance: E||h_T - mean||^2 of that teacher layer over the cache.
    """
    error_BT = (projection(student_BTD) - teacher_BTD).square().sum(-1)
    return LossSum(torch.where(real_BT, error_BT, 0).sum() / variance, real_BT.sum())


def relation_loss(
    student: AttentionVectors,
    teacher: AttentionVectors | AttentionRelations,
    length_B: Tensor,
    *,
    heads: int,
    weights: Sequence[float],
) -> LossSum:
    """Sum over real positions of alpha_q KL_q + alpha_k KL_k + alpha_v KL_v, each the mean over `heads` relation heads.

    MiniLMv2 (Wang et al., Findings of ACL 2021), equation 5, with separate weights for the three relations.
    """
    total = length_B.new_zeros((), dtype=torch.float32)
    for name, weight in zip(VECTORS, weights, strict=True):
        if weight:
            total = total + weight * one_relation_loss(name, student, teacher, length_B, heads=heads)
    return LossSum(total, length_B.sum())


def one_relation_loss(
    name: str,
    student: AttentionVectors,
    teacher: AttentionVectors | AttentionRelations,
    length_B: Tensor,
    *,
    heads: int,
) -> Tensor:
    """Sum over real positions of the KL of the query, key or value relation, the mean over `heads` relation heads.

    Relations that the cache holds as matrices have the heads that they were stored with.
    """
    student_BATd = split_relation_heads(getattr(student, f"{name}_BTD"), heads)
    if isinstance(teacher, AttentionRelations):
        return stored_relation_kl_sum(getattr(teacher, f"{name}_BATT"), student_BATd, length_B)
    return relation_kl_sum(split_relation_heads(getattr(teacher, f"{name}_BTD"), heads), student_BATd, length_B)


def distribution_loss(
    head: Callable[[Tensor], Tensor],
    hidden_PD: Tensor,
    targets: TopkTargets | SampledTargets,
    *,
    vocab_size: int,
    temperature: float,
    logits_at_a_time: int = LOGITS_AT_A_TIME,
) -> LossSum:
    """The loss of head(hidden) over P positions, never more than `logits_at_a_time` logits at once.

    `distribution_tail_loss` of top-k targets, `distribution_sampled_loss` of sampled ones. Where one run of positions
    is not enough, each run's logits are computed again in the backward pass.
    """
    run = max(1, logits_at_a_time // vocab_size)

    def run_loss(hidden: Tensor, *parts: Tensor) -> Tensor:
        return logits_loss(head(hidden), type(targets)(*parts), temperature=temperature)

    if len(hidden_PD) <= run:
        return LossSum(run_loss(hidden_PD, *targets), targets.real_P.sum())
    totals = [
        checkpoint(run_loss, *parts, use_reentrant=False)
        for parts in zip(hidden_PD.split(run), *(part.split(run) for part in targets), strict=True)
    ]
    return LossSum(torch.stack(totals).sum(), targets.real_P.sum())


def logits_loss(logits_PV: Tensor, targets: TopkTargets | SampledTargets, *, temperature: float = 1.0) -> Tensor:
    """The loss that belongs to this form of the cached distribution, summed over real positions."""
    if isinstance(targets, SampledTargets):
        return distribution_sampled_loss(logits_PV, targets, temperature=temperature)
    return distribution_tail_loss(logits_PV, targets, temperature=temperature)


def distribution_tail_loss(logits_PV: Tensor, targets: TopkTargets, *, temperature: float = 1.0) -> Tensor:
    """Sum over real positions of tau^2 KL(p || q), all entries outside the K kept ones pooled into one.

        sum_K p log(p / q) + p_rest log(p_rest / q_rest),   q = softmax(logits / tau)

    log q_rest is the log-sum-exp of the student's other logits: 1 - sum_K q would lose everything below 1e-7. A tail of
    mass 0 (log -inf) contributes 0, and so do entries of probability 0. Differentiable once.
    """
    total: Tensor = _TailLoss.apply(logits_PV, *targets, temperature)  # type: ignore[no-untyped-call]
    return total


class _TailLoss(torch.autograd.Function):
    """The loss with its gradient written out: one exponential per logit and one buffer beside the logits.

    With m = sum_K p + p_rest and logits divided by tau, the gradient is m q - p at the kept entries and
    (m q_rest - p_rest) softmax(others) at the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        ids_PK: Tensor,
        log_p_PK: Tensor,
        log_tail_P: Tensor,
        real_P: Tensor,
        temperature: float,
    ) -> Tensor:
        ids_PK = ids_PK.long()
        others_PV = logits_PV.to(_wide(logits_PV.dtype), copy=True)
        if temperature != 1:
            others_PV.div_(temperature)
        kept_PK = others_PV.gather(1, ids_PK)
        log_rest_P = _exponentials_without(others_PV, ids_PK)
        log_norm_P = torch.logaddexp(kept_PK.logsumexp(1), log_rest_P)
        log_q_PK, log_q_rest_P = kept_PK - log_norm_P[:, None], log_rest_P - log_norm_P
        p_PK, kept_KL_PK = _weighted_log_ratio(log_p_PK, log_q_PK, real_P[:, None])
        p_rest_P, rest_KL_P = _weighted_log_ratio(log_tail_P, log_q_rest_P, real_P)
        mass_P = p_PK.sum(1) + p_rest_P
        ctx.save_for_backward(
            others_PV, ids_PK, mass_P[:, None] * log_q_PK.exp() - p_PK, mass_P * log_q_rest_P.exp() - p_rest_P
        )
        ctx.temperature, ctx.dtype = temperature, logits_PV.dtype
        return temperature**2 * (kept_KL_PK.sum() + rest_KL_P.sum())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares_PV, ids_PK, kept_PK, rest_P = ctx.saved_tensors
        factor = grad * ctx.temperature
        # in place: no second buffer of this size, and autograd refuses a second backward pass through a changed tensor
        gradient_PV = shares_PV.mul_((factor * rest_P)[:, None])
        gradient_PV.scatter_(1, ids_PK, factor * kept_PK)
        return gradient_PV.to(ctx.dtype), None, None, None, None, None


def _exponentials_without(logits_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """Replace `logits_PV` by its softmax over all entries but `ids_PK`; returns the log-sum-exp of those others.

    Where there are no others, every entry becomes 0 and the result -inf.
    """
    logits_PV.scatter_(1, ids_PK, float("-inf"))
    largest_P1 = logits_PV.amax(1, keepdim=True)
    largest_P1 = torch.where(largest_P1.isneginf(), 0, largest_P1)
    sums_P1 = logits_PV.sub_(largest_P1).exp_().sum(1, keepdim=True)
    logits_PV.div_(torch.where(sums_P1 == 0, 1, sums_P1))
    return (largest_P1 + sums_P1.log()).squeeze(1)


def distribution_sampled_loss(logits_PV: Tensor, targets: SampledTargets, *, temperature: float = 1.0) -> Tensor:
    """Sum over real positions of tau^2 KL(c / N || q), c being the counts of N = sum(c) draws from the teacher.

        sum_K c/N log((c/N) / q),   q = softmax(logits / tau)

    Its gradient, tau (q - c/N), is that of the full distribution on average over the draws; its value is larger by the
    entropy that the draws lack. Differentiable once.
    """
    total: Tensor = _SampledLoss.apply(logits_PV, *targets, temperature)  # type: ignore[no-untyped-call]
    return total


class _SampledLoss(torch.autograd.Function):
    """The loss with its gradient written out: one exponential per logit and one buffer beside the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, ids_PK: Tensor, counts_PK: Tensor, real_P: Tensor, temperature: float
    ) -> Tensor:
        ids_PK = ids_PK.long()
        shares_PV = logits_PV.to(_wide(logits_PV.dtype), copy=True)
        if temperature != 1:
            shares_PV.div_(temperature)
        largest_P1 = shares_PV.amax(1, keepdim=True)
        drawn_PK = shares_PV.sub_(largest_P1).gather(1, ids_PK)
        sums_P1 = shares_PV.exp_().sum(1, keepdim=True)
        counts_PK = torch.where(real_P[:, None], counts_PK, 0).to(shares_PV.dtype)
        p_PK = counts_PK / counts_PK.sum(1, keepdim=True).clamp_min(1)
        _, kl_PK = _weighted_log_ratio(p_PK.log(), drawn_PK - sums_P1.log(), real_P[:, None])
        # 1 / sum at real positions: a position that is not real, or has no draws, gets no gradient
        ctx.save_for_backward(shares_PV, ids_PK, p_PK, p_PK.sum(1, keepdim=True) / sums_P1)
        ctx.temperature, ctx.dtype = temperature, logits_PV.dtype
        return temperature**2 * kl_PK.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares_PV, ids_PK, p_PK, scale_P1 = ctx.saved_tensors
        factor = grad * ctx.temperature
        # in place: no second buffer of this size, and autograd refuses a second backward pass through a changed tensor
        gradient_PV = shares_PV.mul_(factor * scale_P1)
        gradient_PV.scatter_add_(1, ids_PK, -factor * p_PK)
        return gradient_PV.to(ctx.dtype), None, None, None, None


def _weighted_log_ratio(log_p: Tensor, log_q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities p and the terms p log(p / q), both 0 where p is 0 or the place is not real."""
    counts = real & (log_p > float("-inf"))
    log_p = torch.where(counts, log_p.to(log_q.dtype), 0)
    p = torch.where(counts, log_p.exp(), 0)
    return p, torch.where(counts, p * (log_p - log_q), 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
