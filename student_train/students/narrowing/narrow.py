"""A narrower student from its teacher: principal components of the stream, and layer by layer the closest fit.

In: both models by their parts, the teacher layer behind each student layer, and some rows. Out: the student's weights,
set in place, and a `Narrowing` that says what was kept.

1. The teacher reads the rows once. The principal components of its hidden states become the student's (`basis`).
2. Embeddings are projected; the scale and bias of their norm are fitted. Embeddings of a width of their own (ELECTRA)
   stay, and what leads from them into the stream is projected.
3. Layer by layer (`layer`): heads and feed-forward units are chosen by what they write, every linear map and norm is
   fitted to the projected teacher.
4. The masked-LM head follows (`mlm_head`).

A rotation alone would not do: a norm's elementwise scale does not commute with it, and layers that are left out leave
gaps. Everything is solved in closed form, nothing is drawn: the same rows on the same machine give the same weights.
Cost: about two forward passes of the teacher and three of the student over the rows, and for each linear map of I
inputs I^3 operations; 20 s on one CPU core for 6x384 to 3x192. Memory: one float32 hidden state of all rows for each
student layer, and everything inside one teacher layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.students.narrowing.basis import Basis, StateMoments, make_basis, ordinary_moments
from student_train.students.narrowing.layer import LayerFit, trace_layer
from student_train.students.narrowing.mlm_head import fit_head
from student_train.students.narrowing.parts import ModelParts
from student_train.students.narrowing.regression import set_norm
from student_train.students.narrowing.replay import (
    LayerCall,
    at_tokens,
    first_calls,
    inputs_of_embedding_norm,
    run_teacher,
)
from student_train.students.narrowing.sample import TokenSample


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """What a student kept of its teacher, each number beside the teacher's.

    `kept` is the share of the variance of the teacher's hidden states that lies in the student's components.
    `components` are those of a head, where they do not follow from width and heads, `key_heads` the heads of keys and
    values of decoders.
    """

    width: tuple[int, int]
    kept: float
    heads: tuple[int, int]
    units: tuple[int, int]
    tokens: int
    key_heads: tuple[int, int] | None = None
    components: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [f"fitted on {self.tokens:,} tokens"]
        if self.width[0] < self.width[1]:
            parts.append(f"{self.width[0]} components with {self.kept:.0%} of the variance of its hidden states")
        if self.heads[0] != self.heads[1]:
            between = "of" if self.heads[0] < self.heads[1] else "from"
            parts.append(f"{self.heads[0]} {between} {self.heads[1]} heads")
        if self.key_heads is not None and self.key_heads[0] != self.key_heads[1]:
            between = "of" if self.key_heads[0] < self.key_heads[1] else "from"
            parts.append(f"{self.key_heads[0]} {between} {self.key_heads[1]} groups of them")
        components, of_components = self.components or (
            width // heads for width, heads in zip(self.width, self.heads, strict=True)
        )
        if components < of_components:
            parts.append(f"{components} of {of_components} components of a head")
        if self.units[0] < self.units[1]:
            parts.append(f"{self.units[0]:,} of {self.units[1]:,} feed-forward units")
        return ", ".join(parts)


def why_not(student: ModelParts, teacher: ModelParts) -> str | None:
    """Why the student cannot be made from this teacher, in words that follow "layers do not fit"; None if it can."""
    if student.width > teacher.width:
        return "a wider student than the teacher cannot be sliced from it"
    if student.projection is None and teacher.projection is not None:
        return "its embeddings have the layers' width, the teacher's have a width of their own"
    return None


@torch.no_grad()
def narrow(
    student: ModelParts, teacher: ModelParts, layers: Sequence[int], sample: TokenSample, *, with_head: bool
) -> Narrowing:
    """Set the weights of `student`. `layers` are teacher layers from 1 on, one for each student layer.

    Both models must be on the sample's device, without dropout. `with_head` asks for the masked-LM head of both.
    """
    batches = sample.batches()
    teacher_calls = first_calls(teacher, batches)
    last = len(teacher.layers)
    entering, places = run_teacher(
        [(layer.module, layer.attention_norm) for layer in teacher.layers],
        teacher_calls,
        layers,
        wanted={*(layer - 1 for layer in layers), last},
        after_norm=True,
        moments=_moments,
    )
    basis = make_basis(places, teacher.width, student.width)
    _fit_embeddings(student, teacher, basis, batches, teacher_calls)
    calls = first_calls(student, batches)
    hidden = [call.hidden_BTD for call in calls]
    for mine, layer in zip(student.layers, layers, strict=True):
        theirs = teacher.layers[layer - 1]
        trace = trace_layer(theirs, basis, teacher_calls, entering[layer - 1])
        heads = (student.heads, teacher.heads)
        hidden = LayerFit(mine, theirs, basis=basis, heads=heads, calls=calls, hidden=hidden).fit(trace)
    if with_head:
        assert student.head is not None
        assert teacher.head is not None
        fit_head(student.head, teacher.head, basis, at_tokens(calls, hidden), at_tokens(calls, entering[last]))
    return Narrowing(
        width=(student.width, teacher.width),
        kept=basis.kept,
        heads=(student.heads, teacher.heads),
        units=(student.units, teacher.units),
        tokens=sample.tokens,
    )


def _moments(calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> StateMoments:
    return ordinary_moments(hidden_BTD[call.real_BT] for call, hidden_BTD in zip(calls, hidden, strict=True))


def _fit_embeddings(
    student: ModelParts,
    teacher: ModelParts,
    basis: Basis,
    batches: Sequence[TokenSample],
    teacher_calls: Sequence[LayerCall],
) -> None:
    if student.projection is not None:
        _project_after_embeddings(student, teacher, basis)
        return
    for name, table in student.tables.items():
        table.weight.copy_(basis.reader(teacher.tables[name].weight))
    targets_NS = basis.project(at_tokens(teacher_calls, [call.hidden_BTD for call in teacher_calls]))
    sums_NS = inputs_of_embedding_norm(student, batches)
    set_norm(student.embedding_norm, sums_NS, targets_NS, basis.scale(teacher.embedding_norm.weight))


def _project_after_embeddings(student: ModelParts, teacher: ModelParts, basis: Basis) -> None:
    """Embeddings as they are, and the way from them into the narrower stream."""
    assert student.projection is not None
    for name, table in student.tables.items():
        table.weight.copy_(teacher.tables[name].weight)
    student.embedding_norm.load_state_dict(teacher.embedding_norm.state_dict())
    if teacher.projection is None:
        student.projection.weight.copy_(basis.map_DS.T)
        student.projection.bias.zero_()
    else:
        student.projection.weight.copy_(basis.writer(teacher.projection.weight))
        student.projection.bias.copy_(basis.project(teacher.projection.bias))
