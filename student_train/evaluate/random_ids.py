"""Token ids in place of text, where only time matters, or that two programs compute the same; always the same ones."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def random_ids(config: PreTrainedConfig, batch_size: int, seq_len: int) -> Tensor:
    """[batch_size, seq_len] ids of a model's vocabulary, special ones left out; the same ones every time."""
    special = set[int | None]()
    for name in _SPECIAL_IDS:
        # a conversation may end in several ways
        given = getattr(config, name, None)
        special.update(given if isinstance(given, list | tuple) else [given])
    ids = torch.tensor([entry for entry in range(config.vocab_size) if entry not in special])
    draw = torch.Generator().manual_seed(batch_size * 1_000_003 + seq_len)
    return ids[torch.randint(len(ids), (batch_size, seq_len), generator=draw)]
