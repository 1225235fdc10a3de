"""Models in Hugging Face folders, loaded quietly and with a clear account of what the folder lacked.

Transformers gives parameters that a folder lacks random values and carries on; whoever loads a model here learns which
those were. Nothing is ever fetched over a network.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from teacher_cache.errors import StudentError


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in float32, and names of parameters that its folder lacked or that found no place in it."""

    model: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]

    @property
    def has_trained_head(self) -> bool:
        """Whether there is a masked-LM head around the encoder and its weights came from the folder."""
        return encoder_of(self.model) is not self.model and not self.missing


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        StudentError: there is none that can be read.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return config


def load_model(folder: Path, *, with_mlm_head: bool) -> LoadedModel:
    """The model in `folder` as masked language model or as base model, without a pooler where the family allows.

    Raises:
        StudentError: it cannot be loaded, or weights of its encoder are missing.
    """
    config = load_config(folder)
    loader, options = (AutoModelForMaskedLM, {}) if with_mlm_head else (AutoModel, pooler_option(config))
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    missing = frozenset(name for name in report["missing_keys"] if "pooler." not in name)
    encoder = {name for name in missing if not with_mlm_head or name.startswith(model.base_model_prefix + ".")}
    if encoder:
        raise StudentError(
            f"{str(folder)!r} lacks {len(encoder)} weights of its encoder, {min(encoder)!r} among them: random numbers "
            "would stand in their place; give the folder of a complete model"
        )
    return LoadedModel(model=model, missing=missing, unexpected=frozenset(report["unexpected_keys"]))


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base model inside a model with a head; a base model itself."""
    return cast(PreTrainedModel, model.base_model)


def pooler_option(config: PreTrainedConfig) -> Mapping[str, Any]:
    """`add_pooling_layer=False` for families whose base model takes it: nothing that is cached could train a pooler."""
    model_class: Any = MODEL_MAPPING[type(config)]
    parameters = inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports on missing weights from Transformers: ours say what matters."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _unreadable(folder: Path, error: Exception) -> StudentError:
    return StudentError(
        f"{str(folder)!r} is no Hugging Face model folder that can be read ({error}): there is no model to take; give "
        "a folder with config.json and model.safetensors"
    )
