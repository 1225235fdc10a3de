"""Losses of hidden states as pure functions: one student layer against one teacher layer, or against all of them.

In: hidden states of both models, real positions, learned maps from the student's width D_S to the teacher's D. Out: a
`LossSum`, arithmetic in float32. Squared errors are in units of the variance of the teacher layer over the cache: where
a hidden state is matched, the best constant guess costs 1 per position.

*Ordinary* positions are the real ones but for sinks, tokens that would own the variance (`TargetBatch.ordinary_BT`):
the squared errors of these would be all that counts.

Shapes: B rows, T positions, D width, L teacher layers, S student layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from student_train.losses.sums import LossSum

Projection = Callable[[Tensor], Tensor]


def hidden_state_loss(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    real_BT: Tensor,
    projection: Projection,
    variance: float,
    ordinary_BT: Tensor | None = None,
) -> LossSum:
    """Sum over ordinary positions of ||W h_S + b - h_T||^2 / E||h_T - mean||^2: the best constant guess costs 1 each.

    Args:
        student_BTD: the student's hidden state, of its own width.
        teacher_BTD: the teacher's.
        real_BT: True at real positions.
        projection: the learned map from the student's width to the teacher's, in float32.
        variance: E||h_T - mean||^2 of that teacher layer over the cache.
        ordinary_BT: True at ordinary positions; all real ones if it is not given. Other positions add nothing, and are
            counted all the same: layers have different sinks, and their losses are added.
    """
    counted_BT = real_BT if ordinary_BT is None else ordinary_BT
    return LossSum(_squared_error(projection(student_BTD), teacher_BTD, counted_BT) / variance, real_BT.sum())


def first_token_loss(student_BTD: Tensor, teacher_BTD: Tensor, projection: Projection | None) -> LossSum:
    """Sum over rows of || p / ||p|| - t / ||t|| ||^2, p and t the hidden states of the row's first token.

    PKD (Sun et al., EMNLP 2019), the loss L_PT of section 3.2, for one pair of layers. Its models have one width; where
    the widths differ, p is the student's state through a learned map. From 0 to 4 per row, whatever the scale of either
    side; counted in rows.
    """
    student_BD = student_BTD[:, 0] if projection is None else projection(student_BTD[:, 0])
    teacher_BD = normalize(teacher_BTD[:, 0].float(), dim=-1)
    error_BD = normalize(student_BD.float(), dim=-1) - teacher_BD
    rows = torch.full((), len(error_BD), device=error_BD.device)
    return LossSum(error_BD.square().sum(), rows)


def attended_state_loss(
    student_BTD: Tensor,
    teacher_layers: Sequence[Tensor],
    real_BT: Tensor,
    projection: Projection,
    deviations: Sequence[float],
) -> LossSum:
    """Sum over real positions of ||p - c||^2 / D, p = W h_S + b and c being an attended mean of all teacher layers.

        c = sum_j a_j h_j / s_j,   a = softmax_j(p . h_j / (s_j sqrt(D)))

    ALP-KD (Passban et al., AAAI 2021), section 3: in place of a chosen layer, teacher layers combined by attention with
    the student's state as the query; the gradient flows through the weights too. There it is one vector of a text that
    attends and is matched; here every real position is one. The scale 1 / sqrt(D) is that of Transformer attention.

    Args:
        student_BTD: the hidden state of the student layer.
        teacher_layers: h_j, those of the teacher's layers.
        real_BT: True at real positions that are sinks of none of these layers; likewise below.
        projection: the learned map of this student layer.
        deviations: s_j, see `deviation`.
    """
    mapped_BTD = projection(student_BTD)
    width = mapped_BTD.shape[-1]
    scores_BTL = torch.stack(
        [
            (mapped_BTD * teacher_BTD).sum(-1) / (deviation * math.sqrt(width))
            for teacher_BTD, deviation in zip(teacher_layers, deviations, strict=True)
        ],
        dim=-1,
    )
    # layer by layer: one tensor of all layers would be as large as the batch's targets again
    combined_BTD = torch.zeros_like(mapped_BTD)
    for weight_BT, teacher_BTD, deviation in zip(
        scores_BTL.softmax(-1).unbind(-1), teacher_layers, deviations, strict=True
    ):
        combined_BTD = combined_BTD + (weight_BT / deviation)[..., None] * teacher_BTD
    return LossSum(_squared_error(mapped_BTD, combined_BTD, real_BT) / width, real_BT.sum())


def transport_costs(
    mapped_states: Sequence[Tensor], teacher_layers: Sequence[Tensor], real_BT: Tensor, deviations: Sequence[float]
) -> Tensor:
    """Sums over real positions of ||p_i - h_j / s_j||^2 / D for all pairs of layers: float64 [S, L], no gradient.

    Args:
        mapped_states: p_i, the hidden state of each student layer through its map.
        teacher_layers: h_j, those of the teacher's layers.
        real_BT: True at real positions.
        deviations: s_j, see `deviation`.
    """
    width = teacher_layers[0].shape[-1]
    with torch.no_grad():
        columns = []
        for teacher_BTD, deviation in zip(teacher_layers, deviations, strict=True):
            scaled_BTD = teacher_BTD / deviation
            errors = [_squared_error(mapped_BTD, scaled_BTD, real_BT) for mapped_BTD in mapped_states]
            columns.append(torch.stack(errors).double() / width)
        return torch.stack(columns, dim=1)


def transported_state_loss(
    mapped_states: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    real_BT: Tensor,
    deviations: Sequence[float],
    flow: Sequence[Sequence[float]],
    costs_SL: Tensor,
) -> LossSum:
    """sum_ij f_ij d_ij / sum_ij f_ij for a given flow f, d being the `transport_costs` of these states.

    BERT-EMD (Li et al., EMNLP 2020), the earth mover's distance of section 3. Its gradient is computed from one teacher
    state per student layer, the mean m_i of all of them in the proportions of the flow, because

        sum_j f_ij ||p_i - h_j / s_j||^2 = (sum_j f_ij) ||p_i - m_i||^2 + what does not depend on p_i

    so that memory grows with the student's layers, not with the pairs. The costs give the value.
    """
    width, whole = teacher_layers[0].shape[-1], sum(map(sum, flow))
    total = torch.zeros((), device=real_BT.device)
    for mapped_BTD, shares in zip(mapped_states, flow, strict=True):
        given = sum(shares)
        if not given:
            continue
        with torch.no_grad():
            mean_BTD = torch.zeros_like(mapped_BTD)
            for share, teacher_BTD, deviation in zip(shares, teacher_layers, deviations, strict=True):
                if share:
                    mean_BTD.add_(teacher_BTD, alpha=share / (given * deviation))
        total = total + given / (whole * width) * _squared_error(mapped_BTD, mean_BTD, real_BT)
    value = (costs_SL * costs_SL.new_tensor(flow)).sum() / whole
    return LossSum(total - total.detach() + value.to(total.dtype), real_BT.sum())


def deviation(variance: float, width: int) -> float:
    """The standard deviation of a teacher layer's components over the cache: sqrt(variance / D).

    Where one map of a student layer serves all teacher layers, these are divided by it: they differ in scale (by 5 in a
    BERT of 6 layers, whose last one is the small one), and the large ones would be all that counts.
    """
    return math.sqrt(variance / width)


def _squared_error(mapped_BTD: Tensor, teacher_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """Sum over real positions of ||p - h||^2."""
    error_BT = (mapped_BTD - teacher_BTD).square().sum(-1)
    return torch.where(real_BT, error_BT, 0).sum()
