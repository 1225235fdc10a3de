"""Tiny random causal models with byte-level tokenizers of the kinds that families have, as Hugging Face folders."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = "the a cat dog bird sees hears likes old new Straße größer naïve 東京 день".split()
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
EOS = "<|endoftext|>"
BOS_FAMILIES = ("llama", "gemma2")
"""Whose tokenizers put a beginning of text before every text."""


def make_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Documents of so many words at most, with characters of one to three bytes."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, words))) + "." for _ in range(count)]


def make_tokenizer(family: str, *, ids: int = 300, marks: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE: with a beginning of text that it puts before every text, an end of text alone, or no `marks`."""
    special = (["<s>", EOS] if family in BOS_FAMILIES else [EOS]) if marks else []
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=ids, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(make_texts(200, 12, seed=1), trainer)
    named: dict[str, Any] = {"eos_token": AddedToken(EOS, special=True)} if marks else {}
    if marks and family in BOS_FAMILIES:
        named["bos_token"] = "<s>"
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    if marks and family == "gpt2":
        named["bos_token"] = EOS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def make_causal(folder: Path, family: str, *, seed: int = 0, marks: bool = True, ids: int = 300, **sizes: Any) -> Path:
    """A random model of the family with a tokenizer; `vocab_size` beyond the tokenizer's pads the vocabulary."""
    tokenizer = make_tokenizer(family, ids=ids, marks=marks)
    config = AutoConfig.for_model(
        family, **{"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
                   **SIZES, **sizes},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
