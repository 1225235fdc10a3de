"""Facts of a model family that both teacher and student need: its encoder, its longest row, whether it can teach.

The one place that knows families by what they are: nothing else asks for the kind of a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from transformers import (
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base model inside a model with a head; a base model itself."""
    return cast(PreTrainedModel, model.base_model)


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest row that the model can read, None if nothing limits it."""
    for path, module in model.base_model.named_modules():
        # RoBERTa-like tables begin after the padding id, so they are longer than what can be read
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions


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


def why_not_an_encoder(config: PreTrainedConfig) -> str | None:
    """What a model is instead of a masked-LM encoder, in words; None if it is one."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if getattr(config, "is_decoder", False):
        return "a decoder"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None
    return "a decoder" if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "without a masked-LM class in Transformers"
