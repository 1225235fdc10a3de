"""What every loss returns: its sum over what it counts, and the count.

A loss is divided by the positions of the global batch later, so that accumulation and data parallelism do not change
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LossSum(NamedTuple):
    """A loss summed over positions (differentiable scalar) and the number of positions (int64 scalar), or over rows.

    A named tuple because DeepSpeed walks through the outputs of the model that it wraps and knows tuples, lists, dicts.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs


def add_losses(losses: Sequence[LossSum]) -> LossSum:
    """The sum of losses that count the same, such as those of several pairs of layers on the same rows."""
    return LossSum(torch.stack([loss.total for loss in losses]).sum(), losses[0].count)
