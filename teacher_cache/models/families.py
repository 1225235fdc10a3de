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
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from teacher_cache.contract.manifest import ModelKind

_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
}
"""What is counted of every model, by the names that configurations have in common."""

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
    table = _padded_positions(model)
    if table is not None:
        return table.num_embeddings - first_position(model)
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions


def first_position(model: PreTrainedModel) -> int:
    """The position of a row's first token, as the model counts: RoBERTa-like tables begin after the padding id."""
    table = _padded_positions(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def _padded_positions(model: PreTrainedModel) -> nn.Embedding | None:
    """The table of position embeddings that has a row for padding too; longer than what can be read."""
    for path, module in model.base_model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings") and module.padding_idx is not None:
            return module
    return None


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


def kind_of(config: PreTrainedConfig) -> ModelKind:
    """Whether a model predicts masked tokens or next ones: what its family is loaded as.

    A family that can be both, such as BERT, is a masked LM unless its configuration says `is_decoder`.

    Raises:
        ValueError: neither; the message says in words what it is instead.
    """
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder")
    masked, causal = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES, family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not masked and not causal:
        raise ValueError("without a masked-LM or causal-LM class in Transformers")
    kind: ModelKind = "masked-lm" if masked and not getattr(config, "is_decoder", False) else "causal-lm"
    if kind == "causal-lm" and not causal:
        raise ValueError("a decoder without a causal-LM class in Transformers")
    lacking = _what_it_lacks(config, "an encoder" if kind == "masked-lm" else "a decoder")
    if lacking is not None:
        raise ValueError(lacking)
    return kind


def with_head(config: PreTrainedConfig) -> Any:
    """The class of Transformers that loads a model of this kind with its language-modelling head.

    Raises:
        ValueError: as `kind_of`.
    """
    return AutoModelForMaskedLM if kind_of(config) == "masked-lm" else AutoModelForCausalLM


def _what_it_lacks(config: PreTrainedConfig, what: str) -> str | None:
    """FNet mixes tokens without attention, Perceiver and models of images and text keep their sizes elsewhere."""
    for name, meaning in _SIZES.items():
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            found = "not there" if size is None else f"{size!r}"
            return f"{what} whose {meaning} cannot be told ({name!r} in its configuration is {found})"
    return None
