"""Run a model's layers one at a time on a sample of rows, and read what passes between their parts.

A layer is called exactly as its encoder would call it: the first call of each batch is caught on its way, masks and
all, and repeated with other hidden states. So a layer that has just got its weights can be run without those below it.
Shapes: B rows, T positions, N real positions of all rows, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student_train.students.narrowing.basis import StateMoments
from student_train.students.narrowing.decoder_parts import DecoderParts
from student_train.students.narrowing.parts import ModelParts
from student_train.students.narrowing.sample import TokenSample
from teacher_cache.models.inputs import forward_arguments


class _Caught(Exception):  # noqa: N818 - no error
    """Carries the first layer's call out of the encoder."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """How the encoder calls its layers on one batch: hidden states that enter the first, and all other arguments."""

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    real_BT: Tensor


def first_calls(model: ModelParts | DecoderParts, batches: Sequence[TokenSample]) -> list[LayerCall]:
    """The call of the first layer on each batch; the layers themselves are not run."""
    calls = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Caught(args, kwargs)

    hook = model.layers[0].module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model.base(
                    input_ids=batch.input_ids_BT, **forward_arguments(model.base, batch.real_BT, batch.starts_BT)
                )
            except _Caught as caught:
                (hidden, *args), kwargs = caught.args
                calls.append(LayerCall(hidden_BTD=hidden, args=tuple(args), kwargs=kwargs, real_BT=batch.real_BT))
    finally:
        hook.remove()
    return calls


def at_tokens(calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> Tensor:
    """[N, D]: hidden states at the real positions of all batches."""
    return torch.cat([hidden_BTD[call.real_BT] for call, hidden_BTD in zip(calls, hidden, strict=True)])


def run_layer(layer: nn.Module, call: LayerCall, hidden_BTD: Tensor) -> Tensor:
    """What a layer makes of hidden states."""
    result = layer(hidden_BTD, *call.args, **call.kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of modules in the last call of each inside the context, by the names given here."""
    record: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        return lambda _, inputs, output: record.__setitem__(name, (inputs[0], output))

    hooks = [module.register_forward_hook(listen(name)) for name, module in modules.items()]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(module: nn.Module, layer: nn.Module, calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> Tensor:
    """[N, I]: what enters a module of a layer at the real positions, where `hidden` enters the layer."""
    found = []
    for call, hidden_BTD in zip(calls, hidden, strict=True):
        with recorded(module=module) as record:
            run_layer(layer, call, hidden_BTD)
        found.append(record["module"][0][call.real_BT])
    return torch.cat(found)


def inputs_of_embedding_norm(model: ModelParts, batches: Sequence[TokenSample]) -> Tensor:
    """[N, I]: the sums of embeddings at the real positions."""
    found = []
    for batch in batches:
        with recorded(norm=model.embedding_norm) as record:
            first_calls(model, [batch])
        found.append(record["norm"][0][batch.real_BT])
    return torch.cat(found)


def run_teacher(
    layers: Sequence[tuple[nn.Module, nn.Module]],
    calls: Sequence[LayerCall],
    numbers: Sequence[int],
    *,
    wanted: Collection[int],
    after_norm: bool,
    moments: Callable[[Sequence[LayerCall], Sequence[Tensor]], StateMoments],
) -> tuple[dict[int, list[Tensor]], list[StateMoments]]:
    """Hidden states `wanted` of the teacher, batch by batch, and moments of the places that the student will have.

    `layers` are all of the teacher's, each with the norm between its attention and its feed-forward block: the stream
    there is what that norm gives (`after_norm`) or what it is given. `numbers` are those behind the student's layers.
    """
    hidden = [call.hidden_BTD for call in calls]
    states, places = {0: hidden}, [moments(calls, hidden)]
    for number, (layer, norm) in enumerate(layers, start=1):
        attended, output = [], []
        for call, hidden_BTD in zip(calls, hidden, strict=True):
            with recorded(norm=norm) as record:
                output.append(run_layer(layer, call, hidden_BTD))
            attended.append(record["norm"][after_norm])
        hidden = output
        if number in numbers:
            places += [moments(calls, attended), moments(calls, hidden)]
        if number in wanted:
            states[number] = hidden
    return states, places
