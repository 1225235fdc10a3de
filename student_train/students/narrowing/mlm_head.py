"""The masked-LM head of a narrower student: transform, activation, norm, decoder.

Where the head leaves the stream's width at once (ELECTRA), only its transform reads the stream, and the rest is the
teacher's. Elsewhere the decoder is the word embeddings, which have been projected, and what it reads has to follow:
with W the words and A the basis, the S components t' that come closest to the teacher's logits W t are
t' = (A'CA)^-1 A'C t, C the covariance of the words. Nothing linear stands between the activation and the decoder, so
units of the activation cannot be chosen and mixed again. Instead the transform is fitted to t' itself, raised to where
the activation bends little; the norm takes the common height away again.
Shapes: D components of the teacher, S of the student, N positions, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.students.narrowing.basis import Basis
from student_train.students.narrowing.parts import HeadParts
from student_train.students.narrowing.regression import set_linear, set_norm

_HEIGHT = 1.0
"""In standard deviations of what the activation lets through."""


@torch.no_grad()
def fit_head(
    student: HeadParts, teacher: HeadParts, basis: Basis, hidden_NS: Tensor, teacher_hidden_ND: Tensor
) -> None:
    """Set the student's head to what gives the teacher's logits best from `hidden_NS`."""
    student.decoder.bias.copy_(teacher.decoder.bias)
    if student.transform.out_features == teacher.transform.out_features:
        targets_NE = teacher.transform(teacher_hidden_ND)
        set_linear(student.transform, hidden_NS, targets_NE, basis.reader(teacher.transform.weight))
        student.norm.load_state_dict(teacher.norm.state_dict())
        student.decoder.weight.copy_(teacher.decoder.weight)
        return
    student.decoder.weight.copy_(basis.reader(teacher.decoder.weight))
    read_ND = teacher.norm(teacher.activation(teacher.transform(teacher_hidden_ND)))
    targets_NS = read_ND @ _decoder_coordinates(teacher.decoder.weight, basis).to(read_ND)
    mean_S = targets_NS.mean(0)
    spread = (targets_NS - mean_S).square().mean().sqrt()
    raised_NS = (targets_NS - mean_S) / spread + _HEIGHT
    set_linear(student.transform, hidden_NS, raised_NS, torch.zeros_like(student.transform.weight))
    active_NS = student.activation(student.transform(hidden_NS))
    set_norm(student.norm, active_NS, targets_NS, spread.expand_as(mean_S))


def _decoder_coordinates(decoder_VD: Tensor, basis: Basis) -> Tensor:
    """[D, S]: what the teacher's decoder reads, as what the projected one has to read."""
    mean_D = decoder_VD.mean(0).double()
    moments_DD = (decoder_VD.T @ decoder_VD).double() - len(decoder_VD) * torch.outer(mean_D, mean_D)
    moments_DD, map_DS = moments_DD.cpu(), basis.map_DS
    within_SS: Tensor = torch.linalg.pinv(map_DS.T @ moments_DD @ map_DS, hermitian=True)
    return moments_DD @ map_DS @ within_SS
