"""Losses on logits over the whole vocabulary, without the logits: a run of positions at a time, all losses in one pass.

In: what the last linear map of the student's head reads at P positions, that map's weight and bias, and the losses
wanted (`LogitsTerm`). Out: one sum per loss. With 250,002 entries of vocabulary the logits of a batch would take
gigabytes several times over; here those of a run of positions exist, are turned into losses and, in the same memory,
into gradients, and are gone. `projected_losses` does so in the forward pass already and keeps the summed gradients of
its inputs, which the backward pass only has to scale: three matrix products like the materialised loss, none of them
twice. (The idea is known from fused linear cross-entropy kernels, such as mgmalek/efficient_cross_entropy.)

Cost: `logits_at_a_time` numbers, by default more on a GPU, as many again for a second loss, and one float32 gradient of
weight and bias, which the materialised loss has too. Without gradients (validation, frozen weights) none of that work
is done.

Heads that do not end in a plain linear map, and weights that are in pieces, take `recomputed_losses`: the same sums by
ordinary autograd, with the logits of each run computed again in the backward pass.

Shapes: P positions of interest, E width that the last map reads, V vocabulary, N losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from student_train.losses.distributions import Targets, logits_loss, replace_by_gradient, wide

LOGITS_AT_A_TIME = 1 << 25
"""Logits that exist at once: 128 MiB as float32."""

_ON_GPUS = 1 << 28
"""The same on a GPU, 1 GiB. Every run reads and writes the gradient of the weight, which for 250,002 ids is 768 MB: as
much time as the run itself takes where it has few positions, and memory there is wide."""

_SAME_SHARE = 1e-4


class LogitsTerm(NamedTuple):
    """One loss on the logits: its targets at the P positions, its temperature, and its weight in the objective."""

    targets: Targets
    temperature: float
    weight: float

    def at(self, positions: slice) -> Targets:
        """The targets of some of the positions."""
        return type(self.targets)(*(part[positions] for part in self.targets))


def projected_losses(
    hidden_PE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    terms: Sequence[LogitsTerm],
    *,
    logits_at_a_time: int | None = None,
) -> Tensor:
    """The unweighted losses [N] of the logits hidden_PE @ weight_VE.T + bias_V.

    The gradient of all of them is one sum, taken with the terms' weights, since one for each would be another V x E
    numbers. So they must enter what is minimised in the proportion of their weights, as they do in an objective whose
    losses are divided by the same count; a backward pass in any other proportion fails.
    """
    inputs = (hidden_PE, weight_VE, bias_V)
    needed = tuple(torch.is_grad_enabled() and part is not None and part.requires_grad for part in inputs)
    run = _positions_at_a_time(logits_at_a_time, hidden_PE.device, len(weight_VE))
    totals_N: Tensor = _ProjectedLosses.apply(*inputs, tuple(terms), run, needed)  # type: ignore[no-untyped-call]
    return totals_N


class _ProjectedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        terms: tuple[LogitsTerm, ...],
        run: int,
        needed: tuple[bool, ...],
    ) -> Tensor:
        sums = _Gradients(hidden_PE, weight_VE, bias_V, needed)
        totals_N = torch.zeros(len(terms), dtype=sums.dtype, device=hidden_PE.device)
        buffer_PV = hidden_PE.new_empty((min(run, len(hidden_PE)), len(weight_VE)), dtype=sums.dtype)
        for start in range(0, len(hidden_PE), run):
            positions = slice(start, start + run)
            logits_PV = sums.project(positions, buffer_PV)
            gradient_PV = _losses_of_run(logits_PV, terms, positions, totals_N, needed=any(needed))
            sums.add(positions, gradient_PV)
        ctx.gradients = sums.gradients
        ctx.shares = [term.weight / terms[0].weight for term in terms]
        return totals_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of these losses were modified by an inplace operation: one backward pass")
        expected_N = grad_N[0] * grad_N.new_tensor(ctx.shares)
        # asynchronous: on a GPU the host does not wait for it
        torch._assert_async(
            ((grad_N - expected_N).abs() <= _SAME_SHARE * expected_N.abs()).all(),
            "losses of the same logits have one gradient in the proportion of their weights: minimise that sum of them",
        )
        scaled = [None if sum_ is None else sum_.mul_(grad_N[0]).to(dtype) for sum_, dtype in gradients]
        return *scaled, None, None, None


def _losses_of_run(
    logits_PV: Tensor, terms: Sequence[LogitsTerm], positions: slice, totals_N: Tensor, *, needed: bool
) -> Tensor:
    """Add each loss of these positions to its total; returns their gradients summed in the shares of their weights.

    Takes the memory of the logits over.
    """
    combined_PV = logits_PV
    for place, term in enumerate(terms):
        own_PV = logits_PV if place == len(terms) - 1 else logits_PV.clone()
        totals_N[place] += replace_by_gradient(own_PV, term.at(positions), temperature=term.temperature, needed=needed)
        if place == 0:
            combined_PV = own_PV
        elif needed:
            combined_PV.add_(own_PV, alpha=term.weight / terms[0].weight)
    return combined_PV


class _Gradients:
    """The linear map, and sums of the gradients of its input, weight and bias: of those that are needed."""

    def __init__(self, hidden_PE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.dtype = wide(weight_VE.dtype)
        self.hidden_PE, self.weight_VE, self.bias_V = hidden_PE, weight_VE, bias_V
        self.for_hidden, self.for_weight, self.for_bias = (
            torch.zeros_like(part, dtype=self.dtype) if part is not None and wanted else None
            for part, wanted in zip((hidden_PE, weight_VE, bias_V), needed, strict=True)
        )

    @property
    def gradients(self) -> list[tuple[Tensor | None, torch.dtype]]:
        """The sums, each with the type of what it is the gradient of."""
        dtype = self.weight_VE.dtype
        return [(self.for_hidden, dtype), (self.for_weight, dtype), (self.for_bias, dtype)]

    def project(self, positions: slice, buffer_PV: Tensor) -> Tensor:
        """The logits at these positions, in the memory of the buffer."""
        hidden_PE = self.hidden_PE[positions]
        logits_PV = buffer_PV[: len(hidden_PE)]
        if self.weight_VE.dtype != self.dtype:
            return logits_PV.copy_(torch.nn.functional.linear(hidden_PE, self.weight_VE, self.bias_V))
        if self.bias_V is None:
            return torch.mm(hidden_PE, self.weight_VE.T, out=logits_PV)
        return torch.addmm(self.bias_V, hidden_PE, self.weight_VE.T, out=logits_PV)

    def add(self, positions: slice, gradient_PV: Tensor) -> None:
        """Count these positions, given the gradient of the losses with respect to their logits."""
        if self.for_bias is not None:
            self.for_bias.add_(gradient_PV.sum(0))
        # products in the student's type, as autograd would take them, and their sums over all runs in the wider one
        gradient_PV = gradient_PV.to(self.weight_VE.dtype)
        if self.for_hidden is not None:
            self.for_hidden[positions] = (gradient_PV @ self.weight_VE).to(self.dtype)
        if self.for_weight is None:
            return
        if self.for_weight.dtype == gradient_PV.dtype:
            self.for_weight.addmm_(gradient_PV.T, self.hidden_PE[positions])
        elif _adds_into_wider_sums(self.for_weight.device):
            hidden_PE, sum_VE = self.hidden_PE[positions], self.for_weight
            torch.addmm(sum_VE, gradient_PV.T, hidden_PE, out_dtype=sum_VE.dtype, out=sum_VE)
        else:
            self.for_weight.add_(gradient_PV.T @ self.hidden_PE[positions])


@cache
def _adds_into_wider_sums(device: torch.device) -> bool:
    """Whether a product of bfloat16 matrices can be added to a float32 one as it is computed: GPUs can, by new PyTorch.

    Otherwise it is rounded to bfloat16, and written and read once more.
    """
    if device.type != "cuda":
        return False
    factor, sum_ = torch.zeros(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(sum_, factor, factor, out_dtype=torch.float32, out=sum_)
    except (RuntimeError, TypeError):
        return False
    return True


def _positions_at_a_time(logits_at_a_time: int | None, device: torch.device, vocab_size: int) -> int:
    if logits_at_a_time is None:
        logits_at_a_time = _ON_GPUS if device.type == "cuda" else LOGITS_AT_A_TIME
    return max(1, logits_at_a_time // vocab_size)


def recomputed_losses(
    head: Callable[[Tensor], Tensor],
    hidden_PD: Tensor,
    terms: Sequence[LogitsTerm],
    *,
    vocab_size: int,
    logits_at_a_time: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> Tensor:
    """The unweighted losses [N] of head(hidden_PD), for any head.

    Where one run of positions is not enough, each run's logits are computed again in the backward pass.

    Args:
        head: [P, D] -> [P, V].
        hidden_PD: what it reads at the positions of interest.
        terms: the losses.
        vocab_size: V.
        logits_at_a_time: how many logits a run has at most; by default what suits the device.
        agree: asked for the number of runs, given how many there have to be, where several processes bring the weights
            of the head together for every one. Those that are too many have no positions.
    """
    run = _positions_at_a_time(logits_at_a_time, hidden_PD.device, vocab_size)
    runs = max(1, -(-len(hidden_PD) // run))
    if agree is not None:
        runs = agree(runs)

    def run_losses(hidden: Tensor, positions: slice) -> Tensor:
        logits_PV = head(hidden)
        return torch.stack([logits_loss(logits_PV, term.at(positions), temperature=term.temperature) for term in terms])

    if runs == 1:
        return run_losses(hidden_PD, slice(None))
    slices = [slice(number * run, (number + 1) * run) for number in range(runs)]
    parts = [checkpoint(run_losses, hidden_PD[positions], positions, use_reentrant=False) for positions in slices]
    return torch.stack(parts).sum(0)
