"""Losses between the student's logits and a cached distribution: their values, and their gradients written out.

Every form of cached distribution is a record of its own and has one formula. `replace_by_gradient` computes the value
and leaves the gradient with respect to the logits in the memory of the logits: one exponential per logit, no second
buffer of that size, whoever calls it decides what becomes of the gradient. `logits_loss` is the same for autograd.
Values are sums over real positions; arithmetic is float32 whatever the student computes in, float64 where it computes
in that. Where logits come from, and how many exist at a time, is the business of `vocabulary.py`. A student whose
vocabulary is padded to fewer entries than its teacher's has no logits for some ids: `within_vocabulary` says what
becomes of these.

Shapes: P positions of interest, K kept or drawn entries, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TopkTargets(NamedTuple):
    """The cached distribution at P positions: ids and log-probabilities [P, K], log of the other mass [P], real [P].

    Its loss has one bucket more than K, for all other entries: `KL(p || q)` of these K + 1 probabilities. A negative id
    stands for an entry that the student has not got, whose mass is in the bucket.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor
    log_tail_P: Tensor
    real_P: Tensor


class KeptTargets(NamedTuple):
    """The K kept entries alone: both distributions are renormalised over them, KL(p / sum_K p || q / sum_K q).

    A negative id stands for an entry that the student has not got; its log-probability is -inf.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor
    real_P: Tensor


class SampledTargets(NamedTuple):
    """Draws from the distribution at P positions: distinct ids and their counts [P, K], real [P].

    Ids of count 0 fill up a position and mean nothing, but are ids. A single id with count 1 makes the loss the
    cross-entropy of that id.
    """

    ids_PK: Tensor
    counts_PK: Tensor
    real_P: Tensor


Targets = TopkTargets | KeptTargets | SampledTargets


def within_vocabulary(targets: Targets, vocab_size: int) -> Targets:
    """The same targets for a student of `vocab_size` entries, which has no logits for the ids from there on.

    Mass that was kept for such ids goes to that of all other entries. Draws of them are left out, and the others' share
    is of the draws that remain. A position that has none left is not real.
    """
    beyond_PK = targets.ids_PK >= vocab_size
    if isinstance(targets, SampledTargets):
        counts_PK = targets.counts_PK.masked_fill(beyond_PK, 0)
        real_P = targets.real_P & (counts_PK > 0).any(1)
        return SampledTargets(targets.ids_PK.masked_fill(beyond_PK, 0), counts_PK, real_P)
    ids_PK, real_P = targets.ids_PK.masked_fill(beyond_PK, -1), targets.real_P & ~beyond_PK.all(1)
    log_probs_PK = targets.log_probs_PK.masked_fill(beyond_PK, float("-inf"))
    if isinstance(targets, KeptTargets):
        return KeptTargets(ids_PK, log_probs_PK, real_P)
    lost_PK = targets.log_probs_PK.masked_fill(~beyond_PK, float("-inf"))
    log_tail_P = torch.logaddexp(targets.log_tail_P, lost_PK.logsumexp(1))
    return TopkTargets(ids_PK, log_probs_PK, log_tail_P, real_P)


def logits_loss(logits_PV: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """tau^2 times the divergence that belongs to this form of targets, summed over real positions.

    Differentiable once, and only one backward pass: the gradient is scaled where it lies.
    """
    needed = torch.is_grad_enabled() and logits_PV.requires_grad
    total: Tensor = _LogitsLoss.apply(logits_PV, targets, temperature, needed)  # type: ignore[no-untyped-call]
    return total


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, targets: Targets, temperature: float, needed: bool) -> Tensor:
        gradient_PV = logits_PV.to(wide(logits_PV.dtype), copy=True)
        total = replace_by_gradient(gradient_PV, targets, temperature=temperature, needed=needed)
        if needed:
            ctx.save_for_backward(gradient_PV)
        ctx.dtype = logits_PV.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_PV,) = ctx.saved_tensors
        # in place: no second buffer of this size, and autograd refuses a second backward pass through a changed tensor
        return gradient_PV.mul_(grad).to(ctx.dtype), None, None, None


def replace_by_gradient(logits_PV: Tensor, targets: Targets, *, temperature: float, needed: bool = True) -> Tensor:
    """The loss, with its gradient in the place of `logits_PV`, which must be float32 or float64.

    Without `needed` what is left there means nothing.
    """
    if temperature != 1:
        logits_PV.div_(temperature)
    if isinstance(targets, TopkTargets):
        divergence = _tail(logits_PV, targets, needed)
    elif isinstance(targets, KeptTargets):
        divergence = _renormalised(logits_PV, targets, needed)
    else:
        divergence = _sampled(logits_PV, targets, needed)
    if needed and temperature != 1:
        logits_PV.mul_(temperature)
    return temperature**2 * divergence


def _tail(logits_PV: Tensor, targets: TopkTargets, needed: bool) -> Tensor:
    """sum_K p log(p / q) + p_rest log(p_rest / q_rest),   q = softmax(logits).

    log q_rest is the log-sum-exp of the student's other logits: 1 - sum_K q would lose everything below 1e-7. A tail of
    mass 0 (log -inf) contributes 0, and so do entries of probability 0. With m = sum_K p + p_rest the gradient is
    m q - p at the kept entries and (m q_rest - p_rest) softmax(others) at the others.
    """
    ids_PK, kept_PK = _kept_logits(logits_PV, targets.ids_PK)
    largest_P1, sums_P1 = _exponentials_without(logits_PV, ids_PK)
    log_rest_P = (largest_P1 + sums_P1.log()).squeeze(1)
    log_norm_P = torch.logaddexp(kept_PK.logsumexp(1), log_rest_P)
    log_q_PK, log_q_rest_P = kept_PK - log_norm_P[:, None], log_rest_P - log_norm_P
    p_PK, kept_KL_PK = _weighted_log_ratio(targets.log_probs_PK, log_q_PK, targets.real_P[:, None])
    p_rest_P, rest_KL_P = _weighted_log_ratio(targets.log_tail_P, log_q_rest_P, targets.real_P)
    if needed:
        mass_P = p_PK.sum(1) + p_rest_P
        rest_P = mass_P * log_q_rest_P.exp() - p_rest_P
        # where there are no others their exponentials are 0, and so is their sum
        logits_PV.mul_(rest_P[:, None] / torch.where(sums_P1 == 0, 1, sums_P1))
        # what is there is 0; ids that stand in for lacking ones occur twice, and add nothing
        logits_PV.scatter_add_(1, ids_PK, mass_P[:, None] * log_q_PK.exp() - p_PK)
    return kept_KL_PK.sum() + rest_KL_P.sum()


def _kept_logits(logits_PV: Tensor, given_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids to write to and the logits at them: -inf where an id is negative, in whose place another one of the row is.

    Without any in its row that one is 0.
    """
    stand_in_P1 = given_PK.amax(1, keepdim=True).clamp_min(0)
    ids_PK = torch.where(given_PK < 0, stand_in_P1, given_PK).long()
    return ids_PK, logits_PV.gather(1, ids_PK).masked_fill(given_PK < 0, float("-inf"))


def _exponentials_without(logits_PV: Tensor, ids_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logits - largest) for all entries but `ids_PK`, which become 0; their largest, and sum."""
    logits_PV.scatter_(1, ids_PK, float("-inf"))
    largest_P1 = logits_PV.amax(1, keepdim=True)
    largest_P1 = torch.where(largest_P1.isneginf(), 0, largest_P1)
    return largest_P1, logits_PV.sub_(largest_P1).exp_().sum(1, keepdim=True)


def _renormalised(logits_PV: Tensor, targets: KeptTargets, needed: bool) -> Tensor:
    """sum_K p log(p / q) with p and q = softmax(logits) made to sum to 1 over the K entries.

    The gradient is q - p at these and 0 at all others, whose logits do not count at all.
    """
    real_P1 = targets.real_P[:, None]
    ids_PK, kept_PK = _kept_logits(logits_PV, targets.ids_PK)
    log_q_PK = kept_PK.log_softmax(1).masked_fill(targets.ids_PK < 0, float("-inf"))
    log_p_PK = targets.log_probs_PK.to(log_q_PK.dtype).masked_fill(~real_P1, float("-inf"))
    log_mass_P1 = log_p_PK.logsumexp(1, keepdim=True)
    log_p_PK = log_p_PK - torch.where(log_mass_P1.isneginf(), 0, log_mass_P1)
    p_PK, kl_PK = _weighted_log_ratio(log_p_PK, log_q_PK, real_P1)
    if needed:
        # without any mass, and at a position that is not real, there is no gradient
        logits_PV.zero_().scatter_add_(1, ids_PK, p_PK.sum(1, keepdim=True) * log_q_PK.exp() - p_PK)
    return kl_PK.sum()


def _sampled(logits_PV: Tensor, targets: SampledTargets, needed: bool) -> Tensor:
    """sum_K c/N log((c/N) / q),   q = softmax(logits), c being the counts of N = sum(c) draws from the teacher.

    The gradient, q - c/N, is that of the full distribution on average over the draws; the value is larger by the
    entropy that the draws lack.
    """
    ids_PK, real_P1 = targets.ids_PK.long(), targets.real_P[:, None]
    largest_P1 = logits_PV.amax(1, keepdim=True)
    drawn_PK = logits_PV.sub_(largest_P1).gather(1, ids_PK)
    sums_P1 = logits_PV.exp_().sum(1, keepdim=True)
    counts_PK = torch.where(real_P1, targets.counts_PK, 0).to(logits_PV.dtype)
    p_PK = counts_PK / counts_PK.sum(1, keepdim=True).clamp_min(1)
    _, kl_PK = _weighted_log_ratio(p_PK.log(), drawn_PK - sums_P1.log(), real_P1)
    if needed:
        # 1 / sum at real positions: a position that is not real, or has no draws, gets no gradient
        logits_PV.mul_(p_PK.sum(1, keepdim=True) / sums_P1).scatter_add_(1, ids_PK, -p_PK)
    return kl_PK.sum()


def _weighted_log_ratio(log_p: Tensor, log_q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities p and the terms p log(p / q), both 0 where p is 0 or the place is not real."""
    counts = real & (log_p > float("-inf"))
    log_p = torch.where(counts, log_p.to(log_q.dtype), 0)
    p = torch.where(counts, log_p.exp(), 0)
    return p, torch.where(counts, p * (log_p - log_q), 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that losses and sums of gradients are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
