"""Do documents that share a row not see each other? Tried on the model itself: a packed pair against the two alone.

The two are a short segment and one that fills the rest of a row, so that a sliding window which only the packed row
forgets shows too. They are packed in both orders, as two rows of one batch: a family that goes by the positions of its
first row alone would pass with one row and be wrong in every batch of a build. What differs is not a matter of
arithmetic: two documents that see each other differ by as much as they are long (0.85 to 1.8 nats on a 135M-parameter
Llama), where a right mask leaves 1e-6 of the final states' length.
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
    """Compare two segments, packed into rows of `seq_len` tokens in both orders, with the two alone.

    Raises:
        ValueError: the model cannot be told where segments begin, or does not run on them; in words.
    """
    if not takes_positions(model):
        raise ValueError("its forward pass takes no positions, so that it cannot be told where a document begins")
    short = max(1, seq_len // _SHORT_SHARE)
    ids_1T = _some_ids(model, seq_len)
    pair = ids_1T[:, :short], ids_1T[:, short:]
    ids_2T = torch.cat([ids_1T, torch.cat(pair[::-1], dim=1)])
    starts_2T = torch.zeros_like(ids_2T, dtype=torch.bool)
    starts_2T[[0, 0, 1, 1], [0, short, 0, seq_len - short]] = True
    try:
        first_SD, second_SD = (_final_states(model, part, None)[0] for part in pair)
        packed_2TD = _final_states(model, ids_2T, starts_2T)
    except Exception as error:
        # a family's own checks, and what it stumbles over
        raise ValueError(
            f"it does not run on positions that start anew ({type(error).__name__}: {first_line(error)})"
        ) from error
    alone_2TD = torch.stack([torch.cat([first_SD, second_SD]), torch.cat([second_SD, first_SD])])
    if packed_2TD.shape != alone_2TD.shape:
        shapes = f"{tuple(packed_2TD.shape)} where {tuple(alone_2TD.shape)} are due"
        raise ValueError(f"it gives final states of the shape {shapes}, once positions start anew")
    distance_2T = (packed_2TD.float() - alone_2TD.float()).norm(dim=2) / alone_2TD.float().norm(dim=2).clamp_min(1e-30)
    return IsolationReport(
        difference=float(distance_2T.nan_to_num(nan=torch.inf).max()),
        divergence=_divergence(model, second_SD, packed_2TD[0, short:]) if with_head else None,
        allowed=_DIFFERENCE.get(alone_2TD.dtype, _HALF_DIFFERENCE),
    )


def _some_ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Ids that differ, none of them the padding id: some families take their positions from where that stands."""
    ids_1T: torch.Tensor = torch.arange(length, device=model.device)[None] * 7919 % model.config.vocab_size
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids_1T[ids_1T == padding] = (padding + 1) % model.config.vocab_size
    return ids_1T


def _final_states(model: PreTrainedModel, ids_BT: torch.Tensor, starts_BT: torch.Tensor | None) -> torch.Tensor:
    arguments = forward_arguments(model, torch.ones_like(ids_BT, dtype=torch.bool), starts_BT)
    return cast("torch.Tensor", encoder_of(model)(ids_BT, **arguments).last_hidden_state)


def _divergence(model: PreTrainedModel, alone_SD: torch.Tensor, packed_SD: torch.Tensor) -> float | None:
    """None too where the head does not run on final states: `Teacher.probe_head` says that, if logits are wanted."""
    head = LMHead(model)
    try:
        alone_PV, packed_PV = (head(each[:_MOST_COMPARED]).float().log_softmax(dim=1) for each in (alone_SD, packed_SD))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return None
    return float((alone_PV.exp() * (alone_PV - packed_PV)).sum(dim=1).mean())
