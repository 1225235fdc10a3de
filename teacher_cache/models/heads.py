"""The language-modelling head alone: logits at chosen positions only.

`LMHead` runs the model's own forward with the base model replaced by given hidden states, so that not a line is
written per family, and soft caps and scales of logits are what the family makes of them. Where it ends in a plain
linear map over the vocabulary, `projection` is that map and `before_projection` everything before it, for whoever
cannot hold all logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from teacher_cache.errors import TeacherError


class _Answer(BaseModelOutput):
    """Final hidden states and nothing else: what a family's model hands on beside its logits is None.

    Decoders hand on a cache, some of them cross-attention, mixtures of experts what their routers said.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenHiddenStates(nn.Module):
    """Stands where the base model stands and hands over the hidden states that came in as input embeddings."""

    @property
    def decoder(self) -> nn.Module:
        """OPT calls what lies inside its base model."""
        return self

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return _Answer(last_hidden_state=inputs_embeds)


class LMHead:
    """The head of a masked or causal LM as a function of final hidden states. Shares the model's parameters.

    `projection` is the linear map whose output is the logits, or None if the family's head does not end in one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        prefix = model.base_model_prefix
        if prefix not in model._modules:
            raise TeacherError(
                f"{type(model).__name__} has no head over its base model: logits cannot be computed; load it with "
                "AutoModelForMaskedLM or AutoModelForCausalLM, or leave logits out"
            )
        self._model = model

    def __call__(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] final hidden states -> [P, V] logits."""
        return _run_head(self._head(), hidden_PD)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model, the head's among them."""
        return self._model.parameters()

    @property
    def projection(self) -> nn.Linear | None:
        return None if self._last is None else self._last[1]

    def before_projection(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] final hidden states -> [P, E], what `projection` reads. Only where there is one."""
        assert self._last is not None
        return _run_head(self._head(without=self._last[0]), hidden_PD)

    def _head(self, without: str | None = None) -> nn.Module:
        """The model with given hidden states in place of its encoder, and without its module at a path.

        Made anew each time: what is attached to the model's modules meanwhile, such as hooks, is on these copies too.
        """
        head = _with_module(self._model, self._model.base_model_prefix, _GivenHiddenStates())
        return head if without is None else _with_module(head, without, nn.Identity())

    @cached_property
    def _last(self) -> tuple[str, nn.Linear] | None:
        """Path and module of the linear map that the head ends in, if running it shows that it does."""
        head, last = self._head(), self._model.get_output_embeddings()
        path = next((name for name, module in head.named_modules() if module is last), None)
        # a subclass may compute something else
        if path is None or type(last) is not nn.Linear:
            return None
        calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        hook = last.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0], out, out._version)))
        probe_1D = last.weight.new_ones((1, self._model.config.hidden_size))
        with torch.no_grad():
            try:
                logits = head(inputs_embeds=probe_1D[None]).logits
            finally:
                hook.remove()
            # the map's output must be the logits themselves: what is added to them may be 0 at first, or small
            if len(calls) != 1 or logits is not calls[0][1] or logits._version != calls[0][2]:
                return None
            before = _run_head(self._head(without=path), probe_1D)
        return (path, last) if torch.equal(before, calls[0][0][0]) else None


def _run_head(head: nn.Module, hidden_PD: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(inputs_embeds=hidden_PD[None]).logits
    return logits[0]


def _with_module(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """`model` with another module at `path`: shallow copies of those that contain it, the originals of all others."""
    name, _, rest = path.partition(".")
    changed = copy.copy(model)
    inner = _with_module(model._modules[name], rest, module) if rest else module  # type: ignore[arg-type]
    changed._modules = {**model._modules, name: inner}
    # accelerate puts a forward pass of its own over the class's, bound to the module that this is a copy of
    if "_hf_hook" in changed.__dict__:
        changed.__dict__.pop("forward", None)
    return changed
