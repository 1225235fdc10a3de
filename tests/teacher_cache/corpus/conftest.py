"""The tokenizer of a trained decoder, with special tokens put around text as other families do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CausalTokenizer = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def causal_tokenizer(shared_data: Path) -> CausalTokenizer:
    """`causal_tokenizer("<bos> $A <eos>", pad=False)`: 1,024 ids, <pad> 0, <unk> 1, <bos> 2, <eos> 3.

    As it is ("$A") it puts nothing around text, as those of GPT-2 and Qwen do.
    """

    def make(template: str = "$A", *, pad: bool = True) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(shared_data / "causal-tiny")
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        if not pad:
            tokenizer.pad_token = None
        return tokenizer

    return make
