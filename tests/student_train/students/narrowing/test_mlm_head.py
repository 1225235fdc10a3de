"""The head of a narrower student: its logits beside the teacher's, words and hidden states projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from student_train.students.narrowing.basis import StateMoments, make_basis
from student_train.students.narrowing.mlm_head import fit_head
from student_train.students.narrowing.parts import HeadParts


def make_head(width: int) -> HeadParts:
    return HeadParts(
        transform=nn.Linear(width, width), activation=gelu, norm=nn.LayerNorm(width), decoder=nn.Linear(width, 60)
    )


def logits(head: HeadParts, hidden: Tensor) -> Tensor:
    return head.decoder(head.norm(head.activation(head.transform(hidden))))


@torch.no_grad()
def test_logits_follow_the_teacher_through_a_projected_decoder() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 24) @ torch.randn(24, 24) * 0.8 ** torch.arange(24)
    moments = StateMoments(24)
    moments.add(hidden)
    basis = make_basis([moments], 24, 12)
    teacher, student = make_head(24), make_head(12)
    teacher.decoder.weight.copy_(torch.randn(60, 24) * 0.7 ** torch.arange(24) @ torch.randn(24, 24))
    # nearly linear: what a linear map cannot follow is not the question here
    teacher.transform.bias.fill_(6)
    fit_head(student, teacher, basis, basis.project(hidden), hidden)
    words = basis.reader(teacher.decoder.weight)
    assert torch.equal(student.decoder.weight, words) and torch.equal(student.decoder.bias, teacher.decoder.bias)
    # what all words share changes no distribution
    exact, ours = (centred(logits(*each)) for each in ((teacher, hidden), (student, basis.project(hidden))))
    assert (exact - ours).square().sum() < 0.15 * exact.square().sum()


def centred(logits_NV: Tensor) -> Tensor:
    logits_NV = logits_NV - logits_NV.mean(1, keepdim=True)
    return logits_NV - logits_NV.mean(0)
