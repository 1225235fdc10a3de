"""The parts of an encoder by their role, for families whose layers are built like BERT's.

In such a layer hidden states pass attention and a feed-forward block, and a layer norm follows each sum with what came
in ("post-norm"). Families that are built otherwise (norms before the blocks, rotary positions, gated feed-forward
blocks, one layer shared by all) are not in the table, and `find_parts` returns None for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "inner": "ffn.lin1",
    "outer": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
_BERT_HEAD = {
    "transform": "cls.predictions.transform.dense",
    "activation": "cls.predictions.transform.transform_act_fn",
    "norm": "cls.predictions.transform.LayerNorm",
}
# its activation is no module, but always this function
_ROBERTA_HEAD = {"transform": "lm_head.dense", "norm": "lm_head.layer_norm"}
_ELECTRA_HEAD = {
    "transform": "generator_predictions.dense",
    "activation": "generator_predictions.activation",
    "norm": "generator_predictions.LayerNorm",
}
_DISTILBERT_HEAD = {"transform": "vocab_transform", "activation": "activation", "norm": "vocab_layer_norm"}
_FAMILIES = {
    "bert": ("encoder.layer", _BERT_LAYER, _BERT_HEAD),
    "roberta": ("encoder.layer", _BERT_LAYER, _ROBERTA_HEAD),
    "xlm-roberta": ("encoder.layer", _BERT_LAYER, _ROBERTA_HEAD),
    "camembert": ("encoder.layer", _BERT_LAYER, _ROBERTA_HEAD),
    "electra": ("encoder.layer", _BERT_LAYER, _ELECTRA_HEAD),
    "distilbert": ("transformer.layer", _DISTILBERT_LAYER, _DISTILBERT_HEAD),
}
"""By family: the list of layers, the parts of a layer, and those of the masked-LM head before its decoder."""


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """One layer. `inner` leads into the feed-forward block and `outer` out of it."""

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    output_norm: nn.LayerNorm


@dataclass(frozen=True, kw_only=True)
class HeadParts:
    """A masked-LM head: transform, activation, norm, decoder. The decoder may be tied to the word embeddings."""

    transform: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm
    decoder: nn.Linear


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A model. `tables` are its embeddings by name; `head` is None for a base model.

    `projection` leads from the width of the embeddings to that of the layers, if those differ.
    """

    base: PreTrainedModel
    heads: int
    tables: dict[str, nn.Embedding]
    embedding_norm: nn.LayerNorm
    projection: nn.Linear | None
    layers: tuple[LayerParts, ...]
    head: HeadParts | None

    @property
    def width(self) -> int:
        """Components of a hidden state."""
        return self.layers[0].query.in_features

    @property
    def units(self) -> int:
        """Units of a feed-forward block."""
        return self.layers[0].inner.out_features


def find_parts(model: PreTrainedModel) -> ModelParts | None:
    """The parts of a base model or masked language model; None if its family is not built like BERT."""
    if model.config.model_type not in _FAMILIES:
        return None
    base: Any = model.base_model
    list_name, layer_names, head_names = _FAMILIES[model.config.model_type]
    layers: Any = base.get_submodule(list_name)
    head: dict[str, Any] = {role: model.get_submodule(name) for role, name in head_names.items() if base is not model}
    embeddings = base.embeddings
    return ModelParts(
        base=base,
        heads=model.config.num_attention_heads,
        tables={name: table for name, table in embeddings.named_children() if isinstance(table, nn.Embedding)},
        embedding_norm=embeddings.LayerNorm,
        projection=getattr(base, "embeddings_project", None),
        layers=tuple(_layer_parts(layer, layer_names) for layer in layers),
        head=HeadParts(**{"activation": gelu, **head}, decoder=model.get_output_embeddings()) if head else None,
    )


def _layer_parts(layer: nn.Module, names: dict[str, str]) -> LayerParts:
    parts: dict[str, Any] = {role: layer.get_submodule(name) for role, name in names.items()}
    return LayerParts(module=layer, **parts)
