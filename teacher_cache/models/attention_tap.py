"""Read what Transformers compute inside, encoders and decoders: the queries, keys and values of their attention layers.

Every family that goes through the attention interface of Transformers calls a registered function with its
queries, keys and values. Ours records them and then calls SDPA, so a tapped model computes bit for bit what it computes
with SDPA, with gradients, and teacher and student are read by the same code. Recording is on only inside
`record_attention`, and only in the thread that entered it: a recomputation during the backward pass records nothing.

Families that accept the registration and then do not use it record nothing; they are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.errors import TeacherError, first_line

TAP = "kdcache_tap"
_UNHEARD = ("s_aux", "indices")
"""What some families give their attention function and SDPA passes over in silence: logits of sinks, as in gpt-oss, and
the positions that sparse attention chose, as in DeepSeek-V3.2."""


class AttentionRecord:
    """Attention vectors of the layers asked for, filled in by one forward pass."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.vectors: dict[int, AttentionVectors] = {}
        self.calls = 0

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take [B, heads, T, d] of the next layer; layers are counted, not every family numbers its modules.

        Keys and values that query heads share have fewer heads, each of which is taken once.
        """
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
        if unheard := [name for name in _UNHEARD if kwargs.get(name) is not None]:
            raise ValueError(f"SDPA would leave out what its attention is given as {unheard[0]!r}")
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
        TeacherError: on leaving the context, if the model did not call the tap once per layer, or asks for what SDPA
            cannot do.
    """
    record = AttentionRecord(layers)
    if not record.layers:
        yield record
        return
    token = _recording.set(record)
    try:
        yield record
    except ValueError as error:
        # soft caps of Gemma 2, say
        raise _untappable(model, first_line(error)) from error
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
        "ELECTRA, ModernBERT, Llama, Qwen or Mistral"
    )
