"""The transport problem between student and teacher layers, and the layer weights that change with it (BERT-EMD).

Student layer i holds the weight w_i, teacher layer j the weight u_j, both summing to 1. The flow f >= 0 with row sums w
and column sums u that makes sum_ij f_ij d_ij least says how much student layer i learns from teacher layer j, d_ij
being the mean over the real positions of a global batch of the squared error of that pair. Layers that are cheap to
match get more weight: with the unit costs c_i = sum_j f_ij d_ij / w_i,

    w_i <- softmax_i(mean(c) / c_i)

and likewise for u. That is the cost attention of Li et al., EMNLP 2020 (arXiv 2010.06133), section 3, with its
temperature set to the number of layers; its sum(c) / c_i grows with them, and the softmax would leave all the weight on
one. Ratios above `LARGEST_RATIO` count as that, so that a layer that is matched already does not take it either.

The flow of a step comes from the costs of the step before, and that of the first step is w_i u_j. So a step's loss does
not depend on how its batch is cut into passes or shared among processes: the costs are added up over all of them. Cost:
one read of S x L numbers from the device and 2-5 ms on the host per step, by HiGHS in SciPy. On all processes the same
numbers give the same flow. Flow and weights belong to a checkpoint and are kept in it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from teacher_cache.errors import SettingsError

Floats = NDArray[np.float64]

LARGEST_RATIO = 4.0
"""Most by which a layer's unit cost counts as below the mean: e^3, about 20 times the weight of a layer at the mean."""


class LayerTransport(nn.Module):
    """Flow and layer weights of one training. What is seen in evaluation mode counts nothing."""

    def __init__(self, student_layers: int, teacher_layers: int) -> None:
        """Start from the same weight for all layers of a side.

        Raises:
            SettingsError: SciPy, which the second step would need, is not installed.
        """
        if find_spec("scipy") is None:
            raise SettingsError(
                "--mapping 'emd' needs scipy, which solves its transport problem and is not installed: "
                "pip install 'kdcache[emd]'"
            )
        super().__init__()
        self.student_weights: Floats = np.full(student_layers, 1 / student_layers)
        self.teacher_weights: Floats = np.full(teacher_layers, 1 / teacher_layers)
        self.flow: Floats = np.outer(self.student_weights, self.teacher_weights)
        self._costs: Tensor | None = None
        self._count: Tensor | None = None

    def observe(self, costs_SL: Tensor, count: Tensor) -> None:
        """Add a pass of the step: costs summed over positions, and how many positions."""
        if not self.training:
            # counted as nothing, not left out: a process whose only pass this is goes through the step's sum, too
            costs_SL, count = torch.zeros_like(costs_SL), torch.zeros_like(count)
        self._costs = costs_SL if self._costs is None else self._costs + costs_SL
        self._count = count if self._count is None else self._count + count

    def finish_step(self) -> None:
        """Weights and flow for the next step, from what was observed since the last call.

        Costs that are not finite, or of no position, change nothing: a loss that is not finite ends the training
        elsewhere.
        """
        if self._costs is None or self._count is None:
            return
        seen = torch.cat([self._costs.flatten(), self._count.double().reshape(1)])
        self._costs = self._count = None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        *sums, count = seen.tolist()
        costs = np.asarray(sums).reshape(self.flow.shape) / max(count, 1)
        if count and np.isfinite(costs).all():
            spent = self.flow * costs
            self.student_weights = attend_to_costs(spent.sum(1) / self.student_weights)
            self.teacher_weights = attend_to_costs(spent.sum(0) / self.teacher_weights)
            self.flow = solve_transport(costs, self.student_weights, self.teacher_weights)

    def describe(self) -> dict[str, Any]:
        """Where the training has come to: the weights of both sides, and the flow from student to teacher layers."""
        parts = {"student_weights": self.student_weights, "teacher_weights": self.teacher_weights, "flow": self.flow}
        return {name: np.round(part, 6).tolist() for name, part in parts.items()}

    def state(self) -> dict[str, Floats]:
        """What a checkpoint has to keep. Not buffers of the module: an engine in half precision would round those."""
        return {name: getattr(self, name).copy() for name in _STATE}

    def restore(self, state: Mapping[str, Floats]) -> None:
        """Go back to what `state` returned."""
        for name in _STATE:
            setattr(self, name, state[name].copy())


_STATE = ("student_weights", "teacher_weights", "flow")


def attend_to_costs(unit_costs: Floats) -> Floats:
    """Weights softmax(mean(c) / c): more for what costs less, the same for all where nothing costs anything."""
    mean = unit_costs.mean()
    if mean <= 0:
        return np.full(len(unit_costs), 1 / len(unit_costs))
    ratios = mean / np.maximum(unit_costs, mean / LARGEST_RATIO)
    shares = np.exp(ratios - ratios.max())
    weights: Floats = shares / shares.sum()
    return weights


def solve_transport(costs: Floats, student_weights: Floats, teacher_weights: Floats) -> Floats:
    """The flow f >= 0 of least sum f d whose rows sum to `student_weights` and columns to `teacher_weights`.

    A vertex: at most S + L - 1 entries are not 0. Both weights sum to 1.
    """
    from scipy.optimize import linprog

    student_layers, teacher_layers = costs.shape
    rows = np.kron(np.eye(student_layers), np.ones(teacher_layers))
    columns = np.kron(np.ones(student_layers), np.eye(teacher_layers))
    # the last column's sum follows from the others; the flow does not depend on the scale of the costs
    result = linprog(
        costs.ravel() / (np.abs(costs).max() or 1.0),
        A_eq=np.vstack([rows, columns[:-1]]),
        b_eq=np.concatenate([student_weights, teacher_weights[:-1]]),
        method="highs-ds",
    )
    assert result.success, result.message
    flow: Floats = np.maximum(result.x.reshape(costs.shape), 0)
    return flow
