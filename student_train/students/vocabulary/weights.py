"""A model with fewer ids: the rows of embedding and head that are kept, and the ids that its configuration names.

Which tensors have a row per id is found by making the same model of a smaller vocabulary and comparing shapes,
whatever the family calls them: tied and untied heads, their biases, embeddings of another width. Everything else is
taken over bit for bit. Cost: one more copy of what is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from student_train.students.vocabulary.kept_ids import KeptIds
from teacher_cache.errors import StudentError
from teacher_cache.models.families import first_position

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""Attributes that hold ids, beside those called after a token such as `eos_token_id`."""
ConfigT = TypeVar("ConfigT", PreTrainedConfig, GenerationConfig)


def trim_weights(
    model: PreTrainedModel, kept: KeptIds, make: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """The same model with the kept ids alone, on the CPU.

    Args:
        model: with `kept.teacher_entries` ids.
        kept: those that stay.
        make: makes a model like `model` of another configuration; its weights do not matter.

    Raises:
        StudentError: the family has tensors whose shape follows the vocabulary in another way.
    """
    config = trim_config(model.config, kept)
    with torch.random.fork_rng(devices=[]):
        twin = make(config)
    nn.Module.to(twin, model.dtype)
    weights, wanted = model.state_dict(), twin.state_dict()
    if weights.keys() != wanted.keys() or first_position(model) != first_position(twin):
        raise _unknown(model, "of another vocabulary it has other weights")
    twin.load_state_dict({name: _rows(model, name, weights[name], wanted[name], kept) for name in wanted})
    twin.tie_weights()
    settled = getattr(model, "generation_config", None)
    if settled is not None:
        twin.generation_config = trim_config(settled, kept)
    nn.Module.train(twin, model.training)
    return twin


def _rows(model: PreTrainedModel, name: str, weight: Tensor, wanted: Tensor, kept: KeptIds) -> Tensor:
    if weight.shape == wanted.shape:
        return weight.cpu()
    places = [place for place, (old, new) in enumerate(zip(weight.shape, wanted.shape, strict=True)) if old != new]
    if len(places) != 1 or weight.shape[places[0]] != kept.teacher_entries or wanted.shape[places[0]] != len(kept):
        raise _unknown(model, f"{name!r} would go from {tuple(weight.shape)} to {tuple(wanted.shape)}")
    return weight.cpu().index_select(places[0], kept.ids_K)


def _unknown(model: PreTrainedModel, why: str) -> StudentError:
    return StudentError(
        f"the weights of family {model.config.model_type!r} cannot be cut to fewer ids ({why}): which of them belong "
        "to an id is not known; leave the vocabulary whole"
    )


def trim_config(config: ConfigT, kept: KeptIds) -> ConfigT:
    """The same configuration with the student's number of ids, and its ids where it names any."""
    found = copy.deepcopy(config)
    if hasattr(found, "vocab_size"):
        found.vocab_size = len(kept)
    for name, value in _named_ids(config).items():
        setattr(found, name, _each(value, kept))
    return found


def ids_in(config: PreTrainedConfig | GenerationConfig) -> set[int]:
    """The ids that a configuration names."""
    return set(_flat(list(_named_ids(config).values())))


def _named_ids(config: PreTrainedConfig | GenerationConfig) -> Mapping[str, Any]:
    return {
        name: value
        for name, value in vars(config).items()
        if (name.endswith("_token_id") or name in _LISTS) and _flat(value)
    }


def _flat(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [each for part in value for each in _flat(part)]
    return [value] if type(value) is int and value >= 0 else []


def _each(value: Any, kept: KeptIds) -> Any:
    if isinstance(value, list | tuple):
        return [each for each in (_each(part, kept) for part in value) if each is not None]
    return kept.own(value)
