"""Reading tokenizers: the one door to `AutoTokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from teacher_cache.models.token_ids import check_token_ids

_WITHOUT_A_ROW = 2**16
"""Ids beyond a model's vocabulary that its folder may name: people add tokens, and never give them embeddings."""


def read_tokenizer(source: str | Path, config: PreTrainedConfig | None = None, **options: Any) -> Any:
    """The tokenizer of a model by hub id, folder or file. `options` go to Transformers.

    Raises:
        ValueError: a file in the folder names an id far beyond the vocabulary of `config`.
        Exception: whatever the tokenizers library stumbles over.
    """
    entries = getattr(config, "vocab_size", None)
    if type(entries) is int and Path(source).is_dir() and "gguf_file" not in options:
        check_token_ids(Path(source).iterdir(), entries + _WITHOUT_A_ROW)
    return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False, **options)


def largest_needed_id(tokenizer: Any, *, causal: bool) -> int:
    """The largest id that a model has to have an embedding of.

    Tokens that were added to a decoder's tokenizer may lack one, as Gemma 3's placeholder of images does, unless they
    begin, end, part or fill texts, or stand for what is unknown.
    """
    ids = set(tokenizer.get_vocab().values())
    if causal:
        named = {getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "unk", "sep", "pad")}
        ids = ids - set(tokenizer.added_tokens_decoder) | named - {None}
    return int(max(ids))
