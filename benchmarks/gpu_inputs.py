"""Random teachers of any size, with a tokenizer and a text for them: what `gpu.py` builds and trains from.

Nothing is downloaded: a token is a word `wN`, an encoder is an XLM-R, a decoder a Llama, weights come from a seed. What
such a teacher computes means nothing; how fast, and whether two devices agree on it, does not depend on that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

from teacher_cache.models.families import quiet_transformers

SPECIAL = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
END = "<eos>"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a random teacher. `spread` is the deviation of its weights: larger ones tell neighbouring tokens apart."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    causal: bool = False
    spread: float = 0.02


def make_teacher(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """A complete Hugging Face folder; weights are drawn on `device`, which is faster on a GPU."""
    config = causal_config(shape) if shape.causal else masked_config(shape)
    with torch.random.fork_rng(), quiet_transformers(), torch.device(device):
        torch.manual_seed(0)
        model = (AutoModelForCausalLM if shape.causal else AutoModelForMaskedLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases of zero and norms of one would hide a forgotten one
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.cpu().save_pretrained(folder)
    make_tokenizer(shape).save_pretrained(folder)
    return folder


def masked_config(shape: Shape) -> Any:
    ids = {f"{name}_token_id": number for number, name in enumerate(SPECIAL)}
    return XLMRobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.positions + 2,
        type_vocab_size=1,
        initializer_range=shape.spread,
        pad_token_id=ids["pad_token_id"],
        bos_token_id=ids["cls_token_id"],
        eos_token_id=ids["sep_token_id"],
    )


def causal_config(shape: Shape) -> Any:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        intermediate_size=3 * shape.width,
        max_position_embeddings=shape.positions,
        initializer_range=shape.spread,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One id a word, special tokens first; an encoder's text is put between two of them."""
    special = [END] if shape.causal else list(SPECIAL.values())
    words = [f"w{number}" for number in range(shape.vocabulary - len(special))]
    ids = {token: number for number, token in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=END if shape.causal else SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if shape.causal:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    tokenizer.post_processor = processors.BertProcessing(
        *((SPECIAL[name], ids[SPECIAL[name]]) for name in ("sep", "cls"))
    )
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=shape.positions, **names)


def write_text(path: Path, shape: Shape, tokens: int) -> Path:
    """Documents of 20 to 400 words, one a line, that hold at least so many tokens; frequent words are more frequent."""
    draw, known, left = random.Random(20240229), shape.vocabulary - len(SPECIAL), tokens
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            length = draw.randint(20, 400)
            file.write(" ".join(f"w{int(known * draw.random() ** 3)}" for _ in range(length)) + "\n")
            left -= length
    return path
