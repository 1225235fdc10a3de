"""Read what Transformer encoders compute inside: attention vectors, and the masked-LM head alone.

Attention: every family that goes through the attention interface of Transformers calls a registered function with its
queries, keys and values. Ours records them and then calls SDPA, so a tapped model computes bit for bit what it computes
with SDPA, with gradients, and teacher and student are read by the same code. Recording is on only inside
`record_attention`, and only in the thread that entered it: a recomputation during the backward pass records nothing.

Head: `MaskedLMHead` runs the model's own forward with the encoder replaced by given hidden states, so that logits are
computed at chosen positions only, without a line of per-family code. Where it ends in a plain linear map over the
vocabulary, `projection` is that map and `before_projection` everything before it, for whoever cannot hold all logits.

Families that accept the registration and then do not use it record nothing; they are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.errors import TeacherError

TAP = "kdcache_tap"


class AttentionRecord:
    """Attention vectors of the layers asked for, filled in by one forward pass."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.vectors: dict[int, AttentionVectors] = {}
        self.calls = 0

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take [B, heads, T, d] of the next layer; layers are counted, not every family numbers its modules."""
        self.calls += 1
        if self.calls in self.layers:
            self.vectors[self.calls] = AttentionVectors(
                query_BTD=_side_by_side(query), key_BTD=_side_by_side(key), value_BTD=_side_by_side(value)
            )


def _side_by_side(vectors_BHTd: torch.Tensor) -> torch.Tensor:
    return vectors_BHTd.transpose(1, 2).flatten(2)


_recording: ContextVar[AttentionRecord | None] = ContextVar("recording", default=None)


def _tapped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    record = _recording.get()
    if record is not None:
        record.add(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(TAP, _tapped_attention)
AttentionMaskInterface.register(TAP, sdpa_mask)


def enable_tap(model: PreTrainedModel) -> None:
    """Route the model's attention through the tap.

    Raises:
        TeacherError: the family does not take attention functions.
    """
    try:
        model.set_attn_implementation(TAP)
    except (ValueError, KeyError) as error:
        raise _untappable(model, str(error)) from error
    if model.config._attn_implementation != TAP:
        raise _untappable(model, "it keeps its own attention function")


@contextmanager
def record_attention(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[AttentionRecord]:
    """Record queries, keys and values of `layers` (1-based) during one forward pass of `model` inside the context.

    Raises:
        TeacherError: on leaving the context, if the model did not call the tap once per layer.
    """
    record = AttentionRecord(layers)
    if not record.layers:
        yield record
        return
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)
    expected = model.config.num_hidden_layers
    if record.calls != expected:
        raise _untappable(model, f"{record.calls} of its {expected} layers passed through the attention interface")


def _untappable(model: PreTrainedModel, why: str) -> TeacherError:
    family = model.config.model_type
    return TeacherError(
        f"attention of family {family!r} cannot be recorded ({why}): its queries, keys and values are out of reach for "
        "attention transfer; leave attention out (`kdcache build --targets logits,hidden`, `kdtrain --method hs` or "
        "od), or choose a family on the Transformers attention interface such as BERT, RoBERTa, XLM-R, DistilBERT, "
        "ELECTRA or ModernBERT"
    )


class _GivenHiddenStates(nn.Module):
    """Stands where the encoder stands and hands over the hidden states that came in as input embeddings."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class MaskedLMHead:
    """The masked-LM head of a model as a function of final hidden states. Shares the model's parameters.

    `projection` is the linear map whose output is the logits, or None if the family's head does not end in one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        prefix = model.base_model_prefix
        if prefix not in model._modules:
            raise TeacherError(
                f"{type(model).__name__} has no masked-LM head over its encoder: logits cannot be computed; load it "
                "with AutoModelForMaskedLM or leave logits out"
            )
        self._model = model

    def __call__(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] final hidden states -> [P, V] logits."""
        return _run_head(self._head(), hidden_PD)

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
    return changed
