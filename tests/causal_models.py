"""Tiny random causal LMs of many families, and a tokenizer for them: what the tests of decoders share.

Weights are large enough that a token which is seen, or a position that is wrong, changes what follows clearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = [first + second for first in "ba de fi go hu ka le mi no pu ra se ti".split() for second in
         "bo da fe gi ha ko lu me".split()]  # fmt: skip
VOCABULARY = ["<eos>", *(f"Ġ{word}" for word in WORDS)]

COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    # windows shorter than a row
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "olmo2", "smollm3",
    "granite", "cohere", "starcoder2", "mixtral",
)  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the vocabulary, separated by spaces; nothing is put around a text, and there is no padding token."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model of a family in evaluation mode."""
    known = AutoConfig.for_model(family)
    settings = {name: value for name, value in COMMON.items() if hasattr(known, name)} | SPECIAL.get(family, {}) | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_teacher(folder: Path, family: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    """A complete Hugging Face folder of a random model with its tokenizer."""
    make_model(family, seed, **sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, documents: int = 60, seed: int = 0, most: int = 30) -> Path:
    """So many documents of up to `most` words, a line each."""
    draw = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(documents):
        length = int(torch.randint(1, most, (), generator=draw))
        lines.append(" ".join(WORDS[int(n)] for n in torch.randint(len(WORDS), (length,), generator=draw)))
    path.write_text("\n".join(lines) + "\n")
    return path
