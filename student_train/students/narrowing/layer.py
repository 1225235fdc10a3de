"""One layer of a narrower student, fitted to one of the teacher's, part by part in the order of computation.

Every part is fitted on what the student's own parts before it compute, so a part that writes to the stream also makes
up for their errors, as far as its input shows them. Each map is drawn towards the teacher's own map in the new
coordinates. A student layer of the teacher's width, with all its heads and units, comes out as the teacher's layer.
Shapes: N real positions, D and S components of the teacher's and the student's stream, F feed-forward units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from student_train.students.narrowing.attention_heads import HeadMap, choose_heads, map_head
from student_train.students.narrowing.basis import Basis
from student_train.students.narrowing.parts import LayerParts
from student_train.students.narrowing.regression import fit_linear, set_linear, set_norm
from student_train.students.narrowing.replay import LayerCall, at_tokens, inputs_of, recorded, run_layer


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What a teacher layer computes at the real positions; what belongs to the stream in the student's components."""

    query_ND: Tensor
    key_ND: Tensor
    value_ND: Tensor
    context_ND: Tensor
    attention_sum_NS: Tensor
    attended_NS: Tensor
    inner_NF: Tensor
    active_NF: Tensor
    output_sum_NS: Tensor
    output_NS: Tensor


def trace_layer(layer: LayerParts, basis: Basis, calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> LayerTrace:
    """Run a teacher layer on the hidden states that enter it, batch by batch."""
    pieces = [_trace_batch(layer, basis, call, hidden_BTD) for call, hidden_BTD in zip(calls, hidden, strict=True)]
    names = [field.name for field in fields(LayerTrace)]
    return LayerTrace(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


def _trace_batch(layer: LayerParts, basis: Basis, call: LayerCall, hidden_BTD: Tensor) -> LayerTrace:
    with recorded(
        query=layer.query,
        key=layer.key,
        value=layer.value,
        attention_output=layer.attention_output,
        attention_norm=layer.attention_norm,
        inner=layer.inner,
        outer=layer.outer,
        output_norm=layer.output_norm,
    ) as record:
        run_layer(layer.module, call, hidden_BTD)
    entered = {name: before[call.real_BT] for name, (before, _) in record.items()}
    left = {name: after[call.real_BT] for name, (_, after) in record.items()}
    return LayerTrace(
        query_ND=left["query"],
        key_ND=left["key"],
        value_ND=left["value"],
        context_ND=entered["attention_output"],
        attention_sum_NS=basis.project(entered["attention_norm"]),
        attended_NS=basis.project(left["attention_norm"]),
        inner_NF=left["inner"],
        active_NF=entered["outer"],
        output_sum_NS=basis.project(entered["output_norm"]),
        output_NS=basis.project(left["output_norm"]),
    )


class LayerFit:
    """Fits one layer of the student. `heads` are the numbers of attention heads of the student and the teacher."""

    def __init__(
        self,
        student: LayerParts,
        teacher: LayerParts,
        *,
        basis: Basis,
        heads: tuple[int, int],
        calls: Sequence[LayerCall],
        hidden: Sequence[Tensor],
    ) -> None:
        self.student, self.teacher, self.basis = student, teacher, basis
        self.heads = heads
        self.calls, self.hidden = calls, hidden

    @torch.no_grad()
    def fit(self, trace: LayerTrace) -> list[Tensor]:
        """Set the layer's weights to what comes closest to `trace`; returns what it puts out, batch by batch."""
        self._fit_attention(trace)
        self._fit_feed_forward(trace)
        return [run_layer(self.student.module, *each) for each in zip(self.calls, self.hidden, strict=True)]

    def _fit_attention(self, trace: LayerTrace) -> None:
        mine, theirs, basis = self.student, self.teacher, self.basis
        hidden_NS = at_tokens(self.calls, self.hidden)
        writer_SD = basis.writer(theirs.attention_output.weight)
        maps = self._map_heads(trace, writer_SD)
        read = (
            (mine.query, theirs.query, trace.query_ND, [each.query_ed for each in maps], True),
            (mine.key, theirs.key, trace.key_ND, [each.key_ed for each in maps], False),
            (mine.value, theirs.value, trace.value_ND, [each.value_ed for each in maps], False),
        )
        for linear, source, targets_ND, head_maps, with_zeros in read:
            map_SD = _side_by_side(maps, head_maps, trace.query_ND.shape[1]).to(targets_ND)
            fitted = fit_linear(hidden_NS, targets_ND @ map_SD.T, map_SD @ basis.reader(source.weight))
            # components that a teacher head has not got: queries of 0, but something in keys and values to learn from
            rows = slice(None) if with_zeros else map_SD.any(1)
            linear.weight[rows], linear.bias[rows] = (part.to(targets_ND)[rows] for part in fitted)
        value_SD = _side_by_side(maps, [each.value_ed for each in maps], len(writer_SD.T))
        prior_SS = writer_SD @ torch.linalg.pinv(value_SD).to(writer_SD)
        context_NS = self._entering(mine.attention_output)
        set_linear(mine.attention_output, context_NS, trace.attention_sum_NS - hidden_NS, prior_SS)
        self._fit_norm(mine.attention_norm, theirs.attention_norm, trace.attended_NS)

    def _map_heads(self, trace: LayerTrace, writer_SD: Tensor) -> list[HeadMap]:
        count, teacher_count = self.heads
        query, key, value = (each.chunk(teacher_count, 1) for each in (trace.query_ND, trace.key_ND, trace.value_ND))
        context_ND = trace.context_ND - trace.context_ND.mean(0)
        written = zip(context_ND.chunk(teacher_count, 1), writer_SD.chunk(teacher_count, 1), strict=True)
        importance = torch.stack([(context_Nd @ writer_Sd.T).square().sum() for context_Nd, writer_Sd in written])
        components = self.student.query.out_features // count
        return [
            map_head(head, query[head], key[head], value[head], components=components, copy=copy)
            for head, copy in choose_heads(importance, count)
        ]

    def _fit_feed_forward(self, trace: LayerTrace) -> None:
        mine, theirs, basis = self.student, self.teacher, self.basis
        writer_SF = basis.writer(theirs.outer.weight)
        importance_F = trace.active_NF.var(0) * writer_SF.square().sum(0)
        units = importance_F.topk(min(mine.inner.out_features, len(importance_F))).indices.sort().values
        attended_NS = self._entering(mine.inner)
        fitted = fit_linear(attended_NS, trace.inner_NF[:, units], basis.reader(theirs.inner.weight)[units])
        # units that the teacher has not got go on reading what they read at random
        mine.inner.weight[: len(units)], mine.inner.bias[: len(units)] = (part.to(attended_NS) for part in fitted)
        prior_SF = torch.zeros_like(mine.outer.weight)
        prior_SF[:, : len(units)] = writer_SF[:, units]
        set_linear(mine.outer, self._entering(mine.outer), trace.output_sum_NS - attended_NS, prior_SF)
        self._fit_norm(mine.output_norm, theirs.output_norm, trace.output_NS)

    def _fit_norm(self, mine: nn.LayerNorm, theirs: nn.LayerNorm, targets_NS: Tensor) -> None:
        set_norm(mine, self._entering(mine), targets_NS, self.basis.scale(theirs.weight))

    def _entering(self, module: nn.Module) -> Tensor:
        return inputs_of(module, self.student.module, self.calls, self.hidden)


def _side_by_side(maps: Sequence[HeadMap], head_maps: Sequence[Tensor], width: int) -> Tensor:
    """[S, D]: the maps of all heads as one, each where its head lies in the teacher and in the student."""
    components, size = head_maps[0].shape
    map_SD = torch.zeros(len(maps) * components, width, dtype=torch.float64)
    for place, (chosen, head_ed) in enumerate(zip(maps, head_maps, strict=True)):
        rows, columns = place * components, chosen.head * size
        map_SD[rows : rows + components, columns : columns + size] = head_ed
    return map_SD
