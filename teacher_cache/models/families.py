"""Facts of a model family that both teacher and student need: its encoder, its longest row, whether it can teach.

The one place that knows families by what they are: nothing else asks for the kind of a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
}
"""What is counted of every encoder, by the names that configurations have in common."""

SWITCHES: Mapping[str, Any] = MappingProxyType(
    {
        "return_dict": True,
        "output_attentions": False,
        "output_hidden_states": False,
        "chunk_size_feed_forward": 0,
        "attn_implementation": None,
    }
)
"""Settings of a configuration that say how a forward pass answers and not what it computes, as they have to be here.

`use_cache` is not among them: encoders ignore it, and it is written in the configuration that a store keeps."""


def read_config(name: str | Path, **options: Any) -> PreTrainedConfig:
    """The configuration of a model by hub id or folder, with its switches as they have to be here.

    People keep configurations from where a model was inspected or served: with tuples for answers, attention matrices
    beside them, or an attention function of one machine. `options` go to Transformers.

    Raises:
        ValueError: the weights are quantised.
        Exception: anything else that Transformers stumbles over in a file.
    """
    config = cast(PreTrainedConfig, AutoConfig.from_pretrained(name, trust_remote_code=False, **SWITCHES, **options))
    # some folders have it under the name of the attribute, which the option leaves as it is
    config._attn_implementation = None
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"its weights are quantised ('quantization_config' in its configuration: {kind!r}), and neither targets "
            "nor first weights can be had from those: give the checkpoint in float32, float16 or bfloat16 that it was "
            "made from"
        )
    return config


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
        return _what_it_lacks(config)
    return "a decoder" if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "without a masked-LM class in Transformers"


def _what_it_lacks(config: PreTrainedConfig) -> str | None:
    """FNet mixes tokens without attention, Perceiver and models of images and text keep their sizes elsewhere."""
    for name, meaning in _SIZES.items():
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            found = "not there" if size is None else f"{size!r}"
            return f"an encoder whose {meaning} cannot be told ({name!r} in its configuration is {found})"
    return None
