"""What a base model is given beside token ids: padding, and documents of one row that must not see each other.

Decoders read no padding mask: what follows a row's last token is seen by nothing before it. Their isolated segments are
said by positions that start anew, without any mask and without a cache, from which Transformers makes the mask of every
layer, sliding windows among them. A mask of ones beside them would switch that off in silence: the documents would see
each other and sit at wrong positions, which is worse than one or the other.

Encoders get a mask of pairs [B, 1, T, T], and positions that start anew. Padding is a segment of its own there, so that
no row of the mask is empty. A ready mask is taken as it is, also by layers that look no further than a window: those of
ModernBERT get one of their own. `measure_isolation` shows whether a model does what is meant.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from teacher_cache.models.attention import restarting_positions
from teacher_cache.models.families import encoder_of, first_position, kind_of


def forward_arguments(
    model: PreTrainedModel, real_BT: torch.Tensor, starts_BT: torch.Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of the base model's forward pass, beside token ids.

    Args:
        model: the model or its base model.
        real_BT: True at the tokens of a row, False at padding behind them.
        starts_BT: True where a segment begins, at the first position at least; None where a row is read as one.
    """
    causal = kind_of(model.config) == "causal-lm"
    if starts_BT is None:
        return {"use_cache": False} if causal else {"attention_mask": real_BT.long()}
    positions_BT = restarting_positions(starts_BT) + first_position(model)
    if causal:
        return {"use_cache": False, "position_ids": positions_BT}
    segment_BT = (starts_BT.cumsum(dim=1) * real_BT)[:, None]
    pairs_B1TT = segment_BT[..., None] == segment_BT[..., None, :]
    return {"attention_mask": _by_kind_of_layer(model.config, pairs_B1TT), "position_ids": positions_BT}


def _by_kind_of_layer(config: PreTrainedConfig, pairs_B1TT: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """One mask, or one for each kind of layer where some have a window: positions up to its width away, both ways."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return pairs_B1TT
    position_T = torch.arange(pairs_B1TT.shape[-1], device=pairs_B1TT.device)
    near_TT = (position_T[:, None] - position_T).abs() <= config.sliding_window
    return {"full_attention": pairs_B1TT, "sliding_attention": pairs_B1TT & near_TT}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the base model can be told the positions of its tokens, without which segments cannot be isolated."""
    return "position_ids" in inspect.signature(encoder_of(model).forward).parameters
