"""One layer of a narrower decoder, fitted to one of its teacher's, part by part in the order of computation.

As in `layer`, every part is fitted on what the student's own parts before it compute, so that what writes to the stream
makes up for their errors, and each map is drawn towards the teacher's own in the new coordinates. Norms only divide by
the length of a state: their scale is the mean one of the components that became one, and the maps behind them are
fitted. Errors of what is written count relative to the length of the teacher's stream there, since that is what the
next norm divides by; without that, a few tokens that are hundreds of times longer than all others would own the fit.
Shapes: N real positions, D and S components of the teacher's and the student's stream, F feed-forward units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from student_train.students.narrowing.basis import Basis
from student_train.students.narrowing.decoder_heads import (
    GroupChoice,
    choose_groups,
    matching_pairs,
    side_by_side,
    turned_map,
    value_map,
)
from student_train.students.narrowing.decoder_parts import DecoderLayer, DecoderParts
from student_train.students.narrowing.regression import fit_map
from student_train.students.narrowing.replay import LayerCall, at_tokens, inputs_of, recorded, run_layer


@dataclass(frozen=True, kw_only=True)
class DecoderTrace:
    """What a teacher layer computes at the real positions: streams in its own components, the parts' inputs, outputs.

    Queries and keys are those before norms of their own and rotary positions; `turned_query_ND` and `turned_key_ND` are
    after the norms where there are any.
    """

    entering_ND: Tensor
    query_ND: Tensor
    key_ND: Tensor
    turned_query_ND: Tensor
    turned_key_ND: Tensor
    value_ND: Tensor
    context_ND: Tensor
    attended_ND: Tensor
    gate_NF: Tensor
    up_NF: Tensor
    active_NF: Tensor
    output_ND: Tensor


def trace_decoder_layer(layer: DecoderLayer, calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> DecoderTrace:
    """Run a teacher layer on the hidden states that enter it, batch by batch."""
    pieces = [_trace_batch(layer, call, hidden_BTD) for call, hidden_BTD in zip(calls, hidden, strict=True)]
    names = [field.name for field in fields(DecoderTrace)]
    return DecoderTrace(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


def _trace_batch(layer: DecoderLayer, call: LayerCall, hidden_BTD: Tensor) -> DecoderTrace:
    with recorded(
        query=layer.query,
        key=layer.key,
        value=layer.value,
        turned_query=layer.query_norm or layer.query,
        turned_key=layer.key_norm or layer.key,
        attention_output=layer.attention_output,
        feed_forward_norm=layer.feed_forward_norm,
        gate=layer.gate,
        up=layer.up,
        down=layer.down,
    ) as record:
        output_BTD = run_layer(layer.module, call, hidden_BTD)
    # heads come apart before their norms
    entered = {name: before.flatten(2)[call.real_BT] for name, (before, _) in record.items()}
    left = {name: after.flatten(2)[call.real_BT] for name, (_, after) in record.items()}
    return DecoderTrace(
        entering_ND=hidden_BTD[call.real_BT],
        query_ND=left["query"],
        key_ND=left["key"],
        turned_query_ND=left["turned_query"],
        turned_key_ND=left["turned_key"],
        value_ND=left["value"],
        context_ND=entered["attention_output"],
        attended_ND=entered["feed_forward_norm"],
        gate_NF=left["gate"],
        up_NF=left["up"],
        active_NF=entered["down"],
        output_ND=output_BTD[call.real_BT],
    )


class DecoderLayerFit:
    """Fits one layer of the student: `student` and `teacher` are the models, `mine` and `theirs` the layers."""

    def __init__(
        self,
        student: DecoderParts,
        teacher: DecoderParts,
        mine: DecoderLayer,
        theirs: DecoderLayer,
        *,
        basis: Basis,
        calls: Sequence[LayerCall],
        hidden: Sequence[Tensor],
    ) -> None:
        self.models, self.mine, self.theirs, self.basis = (student, teacher), mine, theirs, basis
        self.calls, self.hidden = calls, hidden

    @torch.no_grad()
    def fit(self, trace: DecoderTrace) -> list[Tensor]:
        """Set the layer's weights to what comes closest to `trace`; returns what it puts out, batch by batch."""
        self._fit_attention(trace)
        self._fit_feed_forward(trace)
        return [run_layer(self.mine.module, *each) for each in zip(self.calls, self.hidden, strict=True)]

    def _fit_attention(self, trace: DecoderTrace) -> None:
        (student, teacher), mine, theirs = self.models, self.mine, self.theirs
        entering_NS = at_tokens(self.calls, self.hidden)
        ratio_S = set_scale(mine.attention_norm, theirs.attention_norm, self.basis, entering_NS, trace.entering_ND)
        writer_SD = self.basis.writer(theirs.attention_output.weight)
        groups = self._choose_groups(trace, writer_SD)
        pairs = matching_pairs(student.frequencies, teacher.frequencies)
        assert pairs is not None
        turned_ed = turned_map(pairs, student.head_width, teacher.head_width)
        values = trace.value_ND.chunk(teacher.key_heads, 1)
        value_maps = [value_map(values[each.group], student.head_width, each.copy) for each in groups]
        query_SD = side_by_side([(head, turned_ed) for each in groups for head in each.heads], teacher.heads)
        key_SD = side_by_side([(each.group, turned_ed) for each in groups], teacher.key_heads)
        value_SD = side_by_side(
            [(each.group, map_ed) for each, map_ed in zip(groups, value_maps, strict=True)], teacher.key_heads
        )
        # scores are divided by the root of the components of a head
        scale = (student.head_width / teacher.head_width) ** 0.25
        normed_NS = self._entering(mine.query)
        for linear, source, own_norm, targets_ND, map_SD in (
            (mine.query, theirs.query, mine.query_norm, trace.query_ND, query_SD),
            (mine.key, theirs.key, mine.key_norm, trace.key_ND, key_SD),
            (mine.value, theirs.value, None, trace.value_ND, value_SD),
        ):
            factor = 1.0 if own_norm is not None or linear is mine.value else scale
            # what the teacher has not got: queries that are 0, but something in keys and values to learn from
            rows = map_SD.any(1) if linear is not mine.query else torch.ones(len(map_SD), dtype=torch.bool)
            self._fit_reader(
                linear, source, normed_NS, targets_ND, factor * map_SD, theirs.attention_norm, ratio_S, rows
            )
        self._fit_head_norms(trace, turned_ed, query_SD, key_SD, scale)
        context_SD = side_by_side(
            [(head, map_ed) for each, map_ed in zip(groups, value_maps, strict=True) for head in each.heads],
            teacher.heads,
        )
        prior_SS = writer_SD.double().cpu() @ torch.linalg.pinv(context_SD)
        self._fit_writer(mine.attention_output, trace.attended_ND, entering_NS, prior_SS)

    def _choose_groups(self, trace: DecoderTrace, writer_SD: Tensor) -> list[GroupChoice]:
        student, teacher = self.models
        weights_N1 = _by_length(trace.attended_ND)[:, None]
        written = zip(trace.context_ND.chunk(teacher.heads, 1), writer_SD.chunk(teacher.heads, 1), strict=True)
        importance_H = torch.stack(
            [((context_Nd @ writer_Sd.T).square() * weights_N1).sum() for context_Nd, writer_Sd in written]
        )
        return choose_groups(importance_H, teacher.key_heads, student.key_heads, student.heads // student.key_heads)

    def _fit_head_norms(
        self, trace: DecoderTrace, turned_ed: Tensor, query_SD: Tensor, key_SD: Tensor, scale: float
    ) -> None:
        """Norms of queries and keys divide by the length of a head, some of whose components may be gone."""
        mine, theirs = self.mine, self.theirs
        for norm, source, linear, targets_ND, map_SD in (
            (mine.query_norm, theirs.query_norm, mine.query, trace.turned_query_ND, query_SD),
            (mine.key_norm, theirs.key_norm, mine.key, trace.turned_key_ND, key_SD),
        ):
            if norm is None or source is None:
                continue
            prior_e = turned_ed.to(source.weight) @ source.weight
            if turned_ed.shape[0] != turned_ed.shape[1]:
                heads_NHe = self._leaving(linear).unflatten(1, (-1, len(prior_e)))
                normed_NHe = heads_NHe / heads_NHe.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                wanted_NHe = scale * (targets_ND @ map_SD.to(targets_ND).T).unflatten(1, (-1, len(prior_e)))
                prior_e = (normed_NHe * wanted_NHe).sum((0, 1)) / normed_NHe.square().sum((0, 1)).clamp_min(1e-12)
            norm.weight.copy_(prior_e)

    def _fit_feed_forward(self, trace: DecoderTrace) -> None:
        mine, theirs = self.mine, self.theirs
        attended_NS = self._entering(mine.feed_forward_norm)
        ratio_S = set_scale(
            mine.feed_forward_norm, theirs.feed_forward_norm, self.basis, attended_NS, trace.attended_ND
        )
        writer_SF = self.basis.writer(theirs.down.weight)
        weights_N1 = _by_length(trace.output_ND)[:, None]
        importance_F = (trace.active_NF.square() * weights_N1).sum(0) * writer_SF.square().sum(0)
        units = importance_F.topk(min(mine.gate.out_features, len(importance_F))).indices.sort().values
        chosen_FF = torch.zeros(mine.gate.out_features, len(importance_F), dtype=torch.float64)
        chosen_FF[range(len(units)), units.cpu()] = 1
        normed_NS = self._entering(mine.gate)
        for linear, source, targets_NF in ((mine.gate, theirs.gate, trace.gate_NF), (mine.up, theirs.up, trace.up_NF)):
            # units that the teacher has not got go on reading what they read at random
            rows = chosen_FF.any(1)
            self._fit_reader(linear, source, normed_NS, targets_NF, chosen_FF, theirs.feed_forward_norm, ratio_S, rows)
        self._fit_writer(mine.down, trace.output_ND, attended_NS, writer_SF.double().cpu() @ chosen_FF.T)

    def _fit_reader(
        self,
        linear: nn.Linear,
        source: nn.Linear,
        normed_NS: Tensor,
        targets_NO: Tensor,
        map_OO: Tensor,
        norm: nn.RMSNorm,
        ratio_S: Tensor,
        rows: Tensor,
    ) -> None:
        """A map that reads what a norm gives; `map_OO` takes the teacher's outputs to the student's."""
        prior_OS = self.basis.reader((source.weight * norm.weight).double().cpu()) * ratio_S
        map_OO = map_OO[rows]
        weight_OS, bias_O = fit_map(
            normed_NS, targets_NO @ map_OO.to(targets_NO).T, map_OO @ prior_OS, bias=linear.bias is not None
        )
        places = rows.to(linear.weight.device)
        linear.weight[places] = weight_OS.to(linear.weight)
        if bias_O is not None:
            linear.bias[places] = bias_O.to(linear.bias)

    def _fit_writer(self, linear: nn.Linear, stream_ND: Tensor, before_NS: Tensor, prior_SI: Tensor) -> None:
        """A map that adds to the stream, so that the sum comes closest to the teacher's there."""
        targets_NS = self.basis.project(stream_ND) - before_NS
        weight_SI, bias_S = fit_map(
            self._entering(linear), targets_NS, prior_SI, bias=linear.bias is not None, weights_N=_by_length(stream_ND)
        )
        linear.weight.copy_(weight_SI)
        if bias_S is not None:
            linear.bias.copy_(bias_S)

    def _entering(self, module: nn.Module) -> Tensor:
        return inputs_of(module, self.mine.module, self.calls, self.hidden)

    def _leaving(self, linear: nn.Linear) -> Tensor:
        leaving: Tensor = linear(self._entering(linear))
        return leaving


@torch.no_grad()
def set_scale(norm: nn.RMSNorm, source: nn.RMSNorm, basis: Basis, ours_NS: Tensor, theirs_ND: Tensor) -> Tensor:
    """Set the scale of a norm that stands before maps; returns [S], by which those divide what they read of it.

    A component gets the root of the mean squared scale of those that it is made of. What it is divided by is the length
    of the student's state in place of the teacher's: the mean ratio of the two goes to the maps.
    """
    scale_D: Tensor = source.weight.double().cpu()
    if basis.is_whole:
        norm.weight.copy_(source.weight)
        return 1 / torch.where(scale_D == 0, 1.0, scale_D)
    scale_S = (basis.map_DS.square().T @ scale_D.square()).sqrt()
    norm.weight.copy_(scale_S)
    lengths = [part.double().square().mean(1).sqrt().cpu() for part in (ours_NS, theirs_ND)]
    return (lengths[0] / lengths[1].clamp_min(1e-12)).mean() / scale_S.clamp_min(1e-12)


def _by_length(stream_ND: Tensor) -> Tensor:
    """[N]: how much an error at a position counts, which is what the norm after it makes of it."""
    weights_N = 1 / stream_ND.square().mean(1).clamp_min(1e-12)
    return weights_N / weights_N.mean()
