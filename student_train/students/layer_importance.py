"""Which layers of the teacher a shallower student keeps: those without which the cache's own targets suffer most.

In: the teacher with its head, rows with the distributions that are cached for them, and how many layers to keep. Out: a
`LayerChoice`. Layers are left out one at a time, each time the one without which the loss on the cached distribution is
lowest (layer importance by loss, as in Shortened LLaMA, arXiv 2402.02834, and Minitron, arXiv 2407.14679; here again
after every removal, since two layers that can each be missed often cannot both be). Weights are looked at by nobody:
the student is the teacher without these layers, run as it will be, so that this works for every family whose layers
stand in a list.

A layer that is left out hands on the states that enter it, and keeps its place in the list: masks and settings that a
family has for each layer stay with the right one. Layers before the one that is tried compute what they did before, so
that a trial begins there. Cost: for T layers of which S are kept, at most (T^2 - S^2) / 4 passes through all layers
over the rows, one more for each that goes, and twice as many through the head.
Shapes: B rows, T positions, P places, D components.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.losses.distributions import Targets
from student_train.losses.vocabulary import LogitsTerm, projected_losses, recomputed_losses
from student_train.students.initialise import find_layers
from teacher_cache.contract.batch import TargetBatch
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments

IMPORTANCE_TOKENS = 512
"""So many positions are read, padding among them (but one row at least), and up to 16 times as many where few of them
have a distribution."""


@dataclass(frozen=True, kw_only=True)
class RowsWithTargets:
    """Rows in the view whose distributions are cached, and these, at all places row after row."""

    batch: TargetBatch
    targets: Targets
    temperature: float

    @property
    def device(self) -> torch.device:
        """Where they lie, and the model that is run on them has to."""
        return self.batch.input_ids_BT.device

    @property
    def places(self) -> int:
        """How many distributions there are."""
        return int(self.targets.real_P.sum())

    def to(self, device: torch.device) -> RowsWithTargets:
        """The same on a device."""
        targets = type(self.targets)(*(part.to(device) for part in self.targets))
        return RowsWithTargets(batch=self.batch.to(device), targets=targets, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The teacher layers kept, from 1 on, ascending, and those left out in the order in which they went.

    `losses` are the means over `places` of the loss on the cached distribution: of the whole teacher first, then after
    each removal.
    """

    layers: tuple[int, ...]
    removed: tuple[int, ...]
    losses: tuple[float, ...]
    places: int

    def __str__(self) -> str:
        return (
            f"chosen by the loss without each ({self.losses[-1] - self.losses[0]:+.3f} nats on {self.places:,} cached "
            "distributions)"
        )


@torch.no_grad()
def choose_layers(model: PreTrainedModel, count: int, rows: RowsWithTargets) -> LayerChoice:
    """Leave out layers of `model`, which has a head and is in evaluation mode, until `count` are kept.

    Of layers that can be missed equally well the first goes. A layer is not tried again as long as what it cost before
    is more than another costs now: costs grow as layers go, with few exceptions.

    Raises:
        StudentError: the family keeps no list of its layers.
    """
    with _Prunable.of(model) as prunable:
        kept = list(range(1, prunable.depth + 1))
        entering, final_BTD = prunable.trace(kept, rows.batch)
        losses, removed = [_mean_loss(model, final_BTD, rows)], []
        costs = dict.fromkeys(kept, -math.inf)
        while len(kept) > count:
            tried: dict[int, float] = {}
            for layer in sorted(kept, key=lambda layer: (costs[layer], layer)):
                if tried and costs[layer] >= min(tried.values()):
                    break
                others = [other for other in kept if other != layer]
                final_BTD = prunable.run_from(layer, entering[layer], others, rows.batch)
                tried[layer] = _mean_loss(model, final_BTD, rows) - losses[-1]
            costs |= tried
            least = min(tried, key=lambda layer: (tried[layer], layer))
            kept.remove(least)
            removed.append(least)
            losses.append(losses[-1] + tried[least])
            if len(kept) > count:
                entering, _ = prunable.trace(kept, rows.batch)
    return LayerChoice(layers=tuple(kept), removed=tuple(removed), losses=tuple(losses), places=rows.places)


def _mean_loss(model: PreTrainedModel, final_BTD: Tensor, rows: RowsWithTargets) -> float:
    places, real_P = rows.batch.places, rows.targets.real_P
    assert places is not None
    final_PD = places.vectors(final_BTD)[real_P]
    terms = [LogitsTerm(type(rows.targets)(*(part[real_P] for part in rows.targets)), rows.temperature, 1.0)]
    head = LMHead(model)
    if head.projection is None:
        (total,) = recomputed_losses(head, final_PD, terms, vocab_size=model.config.vocab_size)
    else:
        final_PE = head.before_projection(final_PD)
        (total,) = projected_losses(final_PE, head.projection.weight, head.projection.bias, terms)
    # the loss grows with the square of the temperature, so that gradients do not
    return float(total) / rows.temperature**2 / max(1, len(final_PD))


class _Prunable:
    """A model whose layers can be left out one by one, and whose passes can begin at any of them."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._base, self.depth = encoder_of(model), len(layers)
        self._kept: Collection[int] = ()
        self._given: tuple[int, Tensor] | None = None
        self._entered: dict[int, Tensor] = {}
        self._beside: dict[int, tuple[Any, ...]] = {}

    @classmethod
    @contextmanager
    def of(cls, model: PreTrainedModel) -> Iterator[_Prunable]:
        """Take the place of the layers' forward passes, and give them back in the end."""
        _, layers = find_layers(encoder_of(model))
        prunable = cls(model, layers)
        own = [vars(layer).get("forward") for layer in layers]
        try:
            for number, layer in enumerate(layers, start=1):
                # what nn.Module calls; the layer stays what it is for code that asks for its kind
                layer.forward = partial(prunable._pass, number, layer.forward)
            yield prunable
        finally:
            for layer, before in zip(layers, own, strict=True):
                if before is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = before

    def trace(self, kept: Sequence[int], batch: TargetBatch) -> tuple[dict[int, Tensor], Tensor]:
        """The states [B, T, D] that enter each kept layer, and the final ones."""
        final_BTD = self._run(kept, batch, None)
        return {layer: self._entered[layer] for layer in kept}, final_BTD

    def run_from(self, layer: int, entering_BTD: Tensor, kept: Sequence[int], batch: TargetBatch) -> Tensor:
        """The final states [B, T, D] where these states arrive at a layer, kept or not."""
        return self._run(kept, batch, (layer, entering_BTD))

    def _run(self, kept: Sequence[int], batch: TargetBatch, given: tuple[int, Tensor] | None) -> Tensor:
        self._kept, self._given, self._entered = frozenset(kept), given, {}
        arguments = forward_arguments(self._base, batch.real_BT(), batch.starts_BT)
        final_BTD: Tensor = self._base(batch.input_ids_BT.long(), **arguments).last_hidden_state
        return final_BTD

    def _pass(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands where a layer's own forward pass stood."""
        start, given_BTD = self._given or (0, None)
        if number == start:
            args, kwargs = _with_states(args, kwargs, given_BTD)
        if number < start or number not in self._kept:
            hidden_BTD = _states_of(args, kwargs)
            # some families hand on more than states, which the full pass before has shown
            return (hidden_BTD, *self._beside[number]) if number in self._beside else hidden_BTD
        self._entered[number] = _states_of(args, kwargs)
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            self._beside[number] = output[1:]
        return output


def _states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _with_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], states_BTD: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((states_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states_BTD})
