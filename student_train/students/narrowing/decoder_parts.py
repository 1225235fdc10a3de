"""The parts of a decoder by their role, for families whose layers are built like Llama's.

In such a layer a norm without a mean (RMS norm) stands before attention and before a gated feed-forward block, and both
add to the stream ("pre-norm"). Heads of queries share those of keys and values in groups, and rotary positions turn the
pairs of components i and i + d/2 of each by an angle that `frequencies` says. Families that are built otherwise (norms
after the blocks too, layer norms, joined matrices, experts, layers of several kinds) are not in the table, and
`find_decoder_parts` returns None for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.models.families import encoder_of

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer. Queries and keys have norms of their own in some families, one for all heads.

    Each family has a class of its own for its norms, which are alike and have a scale, `weight`.
    """

    module: nn.Module
    attention_norm: nn.RMSNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_norm: nn.RMSNorm | None
    key_norm: nn.RMSNorm | None
    attention_output: nn.Linear
    feed_forward_norm: nn.RMSNorm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


@dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """A model. `head` is None for a base model; it may be tied to the embeddings."""

    base: PreTrainedModel
    heads: int
    key_heads: int
    frequencies: Tensor
    embeddings: nn.Embedding
    layers: tuple[DecoderLayer, ...]
    norm: nn.RMSNorm
    head: nn.Linear | None

    @property
    def width(self) -> int:
        """Components of a hidden state."""
        return self.embeddings.embedding_dim

    @property
    def units(self) -> int:
        """Units of a feed-forward block."""
        return self.layers[0].gate.out_features

    @property
    def head_width(self) -> int:
        """Components of a head."""
        return self.layers[0].query.out_features // self.heads

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings."""
        return self.head is not None and self.head.weight is self.embeddings.weight


def find_decoder_parts(model: PreTrainedModel) -> DecoderParts | None:
    """The parts of a base model or causal language model; None if its family or its layers are built otherwise."""
    config = model.config
    if config.model_type not in _FAMILIES or len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None
    base: Any = encoder_of(model)
    return DecoderParts(
        base=base,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        frequencies=base.rotary_emb.inv_freq,
        embeddings=base.embed_tokens,
        layers=tuple(_layer_parts(layer) for layer in base.layers),
        norm=base.norm,
        head=None if base is model else model.get_output_embeddings(),
    )


def _layer_parts(layer: Any) -> DecoderLayer:
    attention, block = layer.self_attn, layer.mlp
    return DecoderLayer(
        module=layer,
        attention_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        attention_output=attention.o_proj,
        feed_forward_norm=layer.post_attention_layernorm,
        gate=block.gate_proj,
        up=block.up_proj,
        down=block.down_proj,
    )
