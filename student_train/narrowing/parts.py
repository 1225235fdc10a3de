"""The parts of an encoder by their role, for families whose layers are built like BERT's.

In such a layer hidden states pass attention and a feed-forward block, and a layer norm follows each sum with what came
in ("post-norm"). Families that are built otherwise (norms before the blocks, rotary positions, gated feed-forward
blocks, one layer shared by all) are not in the table, and `find_parts` returns None for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
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
_ROBERTA = ("encoder.layer", _BERT_LAYER, ("lm_head.dense", "lm_head.layer_norm"))
_FAMILIES = {
    "bert": ("encoder.layer", _BERT_LAYER, ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": ("encoder.layer", _BERT_LAYER, ("generator_predictions.dense", "generator_predictions.LayerNorm")),
    "distilbert": ("transformer.layer", _DISTILBERT_LAYER, ("vocab_transform", "vocab_layer_norm")),
}
"""By family: the list of layers, the parts of a layer, and the two parts of the masked-LM head before its decoder."""


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
    norm: nn.LayerNorm
    decoder: nn.Linear


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A model. `tables` are its embeddings by name; `projection` leads from their width to the layers', if that
    differs; `head` is None for a base model.
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
    layers = tuple(
        LayerParts(module=layer, **{role: layer.get_submodule(name) for role, name in layer_names.items()})
        for layer in base.get_submodule(list_name)
    )
    head = None
    if base is not model:
        transform, norm = (model.get_submodule(name) for name in head_names)
        head = HeadParts(transform=transform, norm=norm, decoder=model.get_output_embeddings())  # type: ignore[arg-type]
    embeddings = base.embeddings
    return ModelParts(
        base=base,
        heads=model.config.num_attention_heads,
        tables={name: table for name, table in embeddings.named_children() if isinstance(table, nn.Embedding)},
        embedding_norm=embeddings.LayerNorm,
        projection=getattr(base, "embeddings_project", None),
        layers=layers,
        head=head,
    )
