"""Decoded targets of some rows: the one record that the training side sees of a cache.

Shapes: B rows, T positions, D teacher width, A relation heads, M places, K kept entries. A
`TargetBatch` belongs to one view: `input_ids_BT` is exactly what the teacher read to produce the targets beside it, so
the student must read the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

    from teacher_cache.contract.targets import View

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, kw_only=True)
class TargetRequest:
    """Which targets to read: hidden states and attention by layer, the distribution at its places or not.

    `masked` asks for the masked view itself: its input, the masked positions and the ids that stood there. It comes
    with every target of that view. `next_tokens` asks for the rows of a causal teacher with the positions whose next
    token counts, and these tokens, which come with every target of such a teacher. Hidden states of `rotated_layers`
    come in the coordinates in which they are coded (a `CacheSource` says for which layers it has a `rotation`): that
    saves a matrix product where a learned map follows, and distances and variances are the same in both.
    """

    hidden_layers: tuple[int, ...] = ()
    rotated_layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    logits: bool = False
    masked: bool = False
    next_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionVectors:
    """Queries, keys and values of one layer, all heads side by side, float32."""

    query_BTD: torch.Tensor
    key_BTD: torch.Tensor
    value_BTD: torch.Tensor

    def to(self, device: torch.device | str) -> AttentionVectors:
        """The same on a device."""
        return AttentionVectors(
            query_BTD=self.query_BTD.to(device), key_BTD=self.key_BTD.to(device), value_BTD=self.value_BTD.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class AttentionRelations:
    """Relations of the queries, keys and values of one layer to each other, per relation head; float16 as stored.

    Row i of a matrix is softmax_j(x_i . x_j / sqrt(d)) over real positions j; padding rows and columns are 0.
    """

    query_BATT: torch.Tensor
    key_BATT: torch.Tensor
    value_BATT: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TopkLogits:
    """The teacher's K most probable ids, their log-probabilities, and the log of the remaining mass (may be -inf)."""

    ids_BMK: torch.Tensor
    log_probs_BMK: torch.Tensor
    log_tail_BM: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SampledLogits:
    """Ids drawn from the teacher's distribution and how often each was drawn; ids of count 0 fill up and mean nothing.

    The counts of a real place add up to the number of draws, those of one that fills up to 0.
    """

    ids_BMK: torch.Tensor
    counts_BMK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Places:
    """The positions of a view that have a distribution and a label: the first `count_B` of M are real, others hold 0.

    In a masked view they are the masked positions, and the labels are the ids that stood there. In the rows of a causal
    teacher they are positions whose next token counts, and that token is the label.
    """

    positions_BM: torch.Tensor
    label_ids_BM: torch.Tensor
    count_B: torch.Tensor

    def real_BM(self) -> torch.Tensor:
        """True at the places that hold a position."""
        import torch

        places = torch.arange(self.positions_BM.shape[1], device=self.positions_BM.device)
        return places[None, :] < self.count_B[:, None]

    def vectors(self, vectors_BTD: torch.Tensor) -> torch.Tensor:
        """Those at the places, [B * M, D], row after row; what fills up is position 0."""
        return vectors_BTD.take_along_dim(self.positions_BM.long().unsqueeze(-1), dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """The input of one view and the targets that belong to it.

    `starts_BT` is True where a segment of a row begins, in stores whose documents do not see each other; None where a
    row is read as one.
    """

    input_ids_BT: torch.Tensor
    length_B: torch.Tensor
    row_id_B: torch.Tensor
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionVectors | AttentionRelations] = field(default_factory=dict)
    places: Places | None = None
    starts_BT: torch.Tensor | None = None
    logits: TopkLogits | SampledLogits | None = None
    hidden_sinks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """By layer, True at the tokens [B, T] that the store keeps apart since they would own the variance: of hidden
    states in an `nmse` codec."""
    attention_sinks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Likewise, of any of the streams that a layer's attention is read from."""
    unpadded: bool = False
    """Known on the host: no row has padding. Of rows without padding it may be False, too."""

    def real_BT(self) -> torch.Tensor:
        """True at the positions that hold a token of the row, False at padding."""
        import torch

        positions = torch.arange(self.input_ids_BT.shape[1], device=self.input_ids_BT.device)
        return positions[None, :] < self.length_B[:, None]

    def ordinary_BT(self, layer: int) -> torch.Tensor:
        """True at the real positions whose hidden state of this layer is no sink: what errors are counted over."""
        return _without(self.real_BT(), self.hidden_sinks.get(layer))

    def ordinary_attention_BT(self, layer: int) -> torch.Tensor:
        """True at the real positions whose attention vectors of this layer are those of no sink."""
        return _without(self.real_BT(), self.attention_sinks.get(layer))

    def rows(self, start: int, stop: int) -> TargetBatch:
        """Rows start..stop of this batch, as views of the same memory."""
        return _map_tensors(self, lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> TargetBatch:
        """The same batch on another device; it may be read at once. Copies to a GPU are in turn with its stream."""
        import torch

        on_gpu = torch.device(device).type == "cuda"
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=on_gpu))


Batch = dict["View", TargetBatch]
"""One training batch: for each view that the targets need, the same rows."""


def concatenate(batches: Sequence[TargetBatch]) -> TargetBatch:
    """The rows of several batches of one view, one after another."""
    import torch

    return batches[0] if len(batches) == 1 else _zip_tensors(batches, torch.cat)


def _without(real_BT: torch.Tensor, sinks_BT: torch.Tensor | None) -> torch.Tensor:
    return real_BT if sinks_BT is None else real_BT & ~sinks_BT


def _map_tensors(record: RecordT, function: Any) -> RecordT:
    return cast("RecordT", _zip_tensors([record], lambda tensors: function(tensors[0])))


def _zip_tensors(records: Sequence[Any], function: Any) -> Any:
    """Apply `function` to the tensors that stand at the same place of each record; what is said must be so of all."""
    first = records[0]
    if first is None:
        return None
    if is_dataclass(first):
        parts = {
            part.name: _zip_tensors([getattr(record, part.name) for record in records], function)
            for part in fields(first)
        }
        return cast("Any", type(first))(**parts)
    if isinstance(first, bool):
        return all(records)
    if isinstance(first, Mapping):
        return {key: _zip_tensors([record[key] for record in records], function) for key in first}
    return function(list(records))
