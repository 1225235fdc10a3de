"""A narrower decoder from its teacher: principal components of the stream, and layer by layer the closest fit.

The steps are those of `narrow`, for layers built like Llama's (`decoder_parts`):

1. The teacher reads the rows once. The principal components of its stream, as its norms see it (every state of length
   one), become the student's. Which axes they are laid along is free, because norms without a mean do not change under
   rotations and all maps are fitted: they are those in which the final norm's scale is diagonal.
2. Embeddings are projected; a head that is tied to them with them.
3. Layer by layer (`decoder_layer`): groups of heads and feed-forward units are chosen by what they write, every map is
   fitted to the projected teacher.
4. The final norm and the head follow. A tied head is given already, and the norm's scale is what brings its logits
   closest to the teacher's; any other is fitted.

Everything is solved in closed form, nothing is drawn. Cost and memory are those of `narrow`.
Shapes: D components of the teacher, S of the student, N positions, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from student_train.students.narrowing.basis import Basis, StateMoments, leading_vectors
from student_train.students.narrowing.decoder_heads import matching_pairs
from student_train.students.narrowing.decoder_layer import DecoderLayerFit, set_scale, trace_decoder_layer
from student_train.students.narrowing.decoder_parts import DecoderParts
from student_train.students.narrowing.narrow import Narrowing
from student_train.students.narrowing.regression import PRIOR_POSITIONS, fit_map
from student_train.students.narrowing.replay import LayerCall, at_tokens, first_calls, run_teacher
from student_train.students.narrowing.sample import TokenSample

_AT_A_TIME = 4_096


def why_no_decoder(student: DecoderParts, teacher: DecoderParts) -> str | None:
    """Why the student cannot be made from this teacher, in words that follow "layers do not fit"; None if it can."""
    if student.width > teacher.width:
        return "a wider student than the teacher cannot be sliced from it"
    widths = f"its heads of {student.head_width} components, the teacher's of {teacher.head_width}"
    if matching_pairs(_frequencies(student), _frequencies(teacher)) is None:
        alike = [width for width in (teacher.head_width, teacher.head_width // 2) if student.width % width == 0]
        heads = " or ".join(str(student.width // width) for width in alike)
        return f"{widths}, are turned by other rotary frequencies" + (f" ({heads} heads would do)" if heads else "")
    if student.head_width > teacher.head_width and teacher.layers[0].query_norm is not None:
        return f"{widths}, are wider and have norms of their own"
    return None


def _frequencies(parts: DecoderParts) -> Tensor:
    """Also of a model that has been made without memory for its weights, whose buffers say nothing."""
    if not parts.frequencies.is_meta:
        return parts.frequencies
    base: Any = parts.base
    with torch.device("cpu"):
        frequencies: Tensor = type(base.rotary_emb)(config=base.config).inv_freq
    return frequencies


@torch.no_grad()
def narrow_decoder(
    student: DecoderParts, teacher: DecoderParts, layers: Sequence[int], sample: TokenSample, *, with_head: bool
) -> Narrowing:
    """Set the weights of `student`. `layers` are teacher layers from 1 on, one for each student layer.

    Both models must be on the sample's device, without dropout. `with_head` asks for the head of both.
    """
    batches = sample.batches()
    teacher_calls = first_calls(teacher, batches)
    last = len(teacher.layers)
    entering, places = run_teacher(
        [(layer.module, layer.feed_forward_norm) for layer in teacher.layers],
        teacher_calls,
        layers,
        wanted={*(layer - 1 for layer in layers), last},
        after_norm=False,
        moments=_moments,
    )
    final_D = teacher.norm.weight.double().cpu()
    basis = _make_basis(places, teacher.width, student.width, final_D)
    student.embeddings.weight.copy_(basis.reader(teacher.embeddings.weight))
    calls = first_calls(student, batches)
    hidden = [call.hidden_BTD for call in calls]
    for mine, layer in zip(student.layers, layers, strict=True):
        theirs = teacher.layers[layer - 1]
        trace = trace_decoder_layer(theirs, teacher_calls, entering[layer - 1])
        fit = DecoderLayerFit(student, teacher, mine, theirs, basis=basis, calls=calls, hidden=hidden)
        hidden = fit.fit(trace)
    _fit_end(student, teacher, basis, at_tokens(calls, hidden), at_tokens(calls, entering[last]), with_head=with_head)
    return Narrowing(
        width=(student.width, teacher.width),
        kept=basis.kept,
        heads=(student.heads, teacher.heads),
        units=(student.units, teacher.units),
        tokens=sample.tokens,
        key_heads=(student.key_heads, teacher.key_heads),
        components=(student.head_width, teacher.head_width),
    )


def _moments(calls: Sequence[LayerCall], hidden: Sequence[Tensor]) -> StateMoments:
    """Of states of length one: what a norm makes of the longest of them is no longer than of any other."""
    moments = StateMoments(hidden[0].shape[-1])
    for call, hidden_BTD in zip(calls, hidden, strict=True):
        moments.add(torch.nn.functional.normalize(hidden_BTD[call.real_BT], dim=1))
    return moments


def _make_basis(places: Sequence[StateMoments], width: int, student_width: int, final_D: Tensor) -> Basis:
    if student_width == width:
        return Basis(map_DS=torch.eye(width, dtype=torch.float64), kept=1.0, is_whole=True)
    moments_DD = sum((place.second_moments() for place in places), torch.zeros(width, width, dtype=torch.float64))
    covariance_DD = sum((place.covariance() for place in places), torch.zeros(width, width, dtype=torch.float64))
    vectors_DS = leading_vectors(moments_DD, student_width)
    kept = (vectors_DS.T @ covariance_DD @ vectors_DS).trace() / covariance_DD.trace()
    axes_SS = leading_vectors(vectors_DS.T @ (final_D[:, None] * vectors_DS), student_width)
    return Basis(map_DS=vectors_DS @ axes_SS, kept=float(kept))


def _fit_end(
    student: DecoderParts,
    teacher: DecoderParts,
    basis: Basis,
    hidden_NS: Tensor,
    teacher_hidden_ND: Tensor,
    *,
    with_head: bool,
) -> None:
    """The final norm, and the head over the vocabulary."""
    ratio_S = set_scale(student.norm, teacher.norm, basis, hidden_NS, teacher_hidden_ND)
    if basis.is_whole or not with_head:
        if with_head and not student.tied:
            assert student.head is not None and teacher.head is not None
            student.head.load_state_dict(teacher.head.state_dict())
        return
    assert student.head is not None and teacher.head is not None
    read_ND = teacher.norm(teacher_hidden_ND)
    if student.tied:
        scale_D = teacher.norm.weight.double().cpu()
        prior_S = (basis.map_DS.square().T @ scale_D) * ratio_S * student.norm.weight.cpu()
        student.norm.weight.fill_(1.0)
        student.norm.weight.copy_(_tied_scale(student.norm(hidden_NS), read_ND, teacher.head.weight, basis, prior_S))
        return
    # the closest map to what the teacher's head reads; its head after that is the closest to its logits
    prior_DS = (teacher.norm.weight.double().cpu()[:, None] * basis.map_DS) * ratio_S
    map_DS, _ = fit_map(student.norm(hidden_NS), read_ND, prior_DS, bias=False)
    for start in range(0, len(student.head.weight), _AT_A_TIME):
        words = slice(start, start + _AT_A_TIME)
        student.head.weight[words] = teacher.head.weight[words] @ map_DS.to(teacher.head.weight)
    if student.head.bias is not None:
        student.head.bias.copy_(teacher.head.bias)


def _tied_scale(normed_NS: Tensor, read_ND: Tensor, words_VD: Tensor, basis: Basis, prior_S: Tensor) -> Tensor:
    """[S]: the scale g for which the words' logits E A (g n) come closest to E h, in the mean square over words.

    With C the covariance of the words and n and h what the student's norm divides and the teacher's head reads,
    (A'CA * E[n n']) g = diag(A'C E[h n']), * by elements, drawn towards `prior_S`.
    """
    count, mean_D = len(normed_NS), words_VD.mean(0).double()
    words_DD = ((words_VD.T @ words_VD).double() - len(words_VD) * torch.outer(mean_D, mean_D)).cpu()
    read_SD = basis.map_DS.T @ words_DD
    moments_SS = (normed_NS.T @ normed_NS).double().cpu()
    products_DS = (read_ND.T @ normed_NS).double().cpu()
    system_SS = (read_SD @ basis.map_DS) * moments_SS
    strength = PRIOR_POSITIONS / count * float(system_SS.diagonal().mean())
    system_SS.diagonal().add_(strength)
    wanted_S = (read_SD * products_DS.T).sum(1) + strength * prior_S
    scale_S: Tensor = torch.linalg.solve(system_SS, wanted_S)
    return scale_S
