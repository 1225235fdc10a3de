"""Do documents that share a row not see each other? Tried on the model itself: a packed pair against the two alone.

The two are a short segment and one that fills the rest of a row, so that a sliding window which only the packed row
forgets shows too. What differs is not a matter of arithmetic: two documents that see each other differ by as much as
they are long (0.85 to 1.8 nats on a 135M-parameter Llama), where a right mask leaves 1e-6 of the final states' length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from teacher_cache.errors import first_line
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments, takes_positions

_DIFFERENCE = {torch.float32: 0.01, torch.float64: 0.01}
_HALF_DIFFERENCE = 0.1
_SHORT_SHARE = 16
_MOST_COMPARED = 64


@dataclass(frozen=True, kw_only=True)
class IsolationReport:
    """How far a packed pair is from the two alone.

    `difference` is the largest distance of a final state from what it is alone, as a share of that one's length;
    `divergence` the mean KL(alone || packed) of the distributions in nats, None without a head. `allowed` is what
    arithmetic in this number type may make of `difference`.
    """

    difference: float
    divergence: float | None
    allowed: float

    @property
    def isolated(self) -> bool:
        """Whether the two do not see each other."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        said = f"final states differ by {self.difference:.2g} of their length"
        return said if self.divergence is None else f"KL(alone || packed) is {self.divergence:.2g} nats, {said}"


@torch.inference_mode()
def measure_isolation(model: PreTrainedModel, seq_len: int, *, with_head: bool) -> IsolationReport:
    """Compare a packed row of `seq_len` tokens with its two segments alone.

    Raises:
        ValueError: the model cannot be told where segments begin, or does not run on them; in words.
    """
    if not takes_positions(model):
        raise ValueError("its forward pass takes no positions, so that it cannot be told where a document begins")
    short = max(1, seq_len // _SHORT_SHARE)
    ids_1T = _some_ids(model, seq_len)
    pair = ids_1T[:, :short], ids_1T[:, short:]
    starts_1T = torch.zeros_like(ids_1T, dtype=torch.bool)
    starts_1T[0, [0, short]] = True
    try:
        alone_TD = torch.cat([_final_states(model, part, None) for part in pair])
        packed_TD = _final_states(model, ids_1T, starts_1T)
    except Exception as error:
        # a family's own checks, and what it stumbles over
        raise ValueError(
            f"it does not run on positions that start anew ({type(error).__name__}: {first_line(error)})"
        ) from error
    distance_T = (packed_TD.float() - alone_TD.float()).norm(dim=1) / alone_TD.float().norm(dim=1).clamp_min(1e-30)
    return IsolationReport(
        difference=float(distance_T.nan_to_num(nan=torch.inf).max()),
        divergence=_divergence(model, alone_TD[short:], packed_TD[short:]) if with_head else None,
        allowed=_DIFFERENCE.get(alone_TD.dtype, _HALF_DIFFERENCE),
    )


def _some_ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Ids that differ, none of them the padding id: some families take their positions from where that stands."""
    ids_1T: torch.Tensor = torch.arange(length, device=model.device)[None] * 7919 % model.config.vocab_size
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids_1T[ids_1T == padding] = (padding + 1) % model.config.vocab_size
    return ids_1T


def _final_states(model: PreTrainedModel, ids_1T: torch.Tensor, starts_1T: torch.Tensor | None) -> torch.Tensor:
    arguments = forward_arguments(model, torch.ones_like(ids_1T, dtype=torch.bool), starts_1T)
    final_1TD = encoder_of(model)(ids_1T, **arguments).last_hidden_state
    return cast("torch.Tensor", final_1TD[0])


def _divergence(model: PreTrainedModel, alone_TD: torch.Tensor, packed_TD: torch.Tensor) -> float:
    head = LMHead(model)
    alone_PV, packed_PV = (head(each[:_MOST_COMPARED]).float().log_softmax(dim=1) for each in (alone_TD, packed_TD))
    return float((alone_PV.exp() * (alone_PV - packed_PV)).sum(dim=1).mean())
