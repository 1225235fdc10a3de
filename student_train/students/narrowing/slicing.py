"""The door to both kinds of slicing: encoders built like BERT, and decoders built like Llama."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from student_train.students.narrowing.decoder import narrow_decoder, why_no_decoder
from student_train.students.narrowing.decoder_parts import find_decoder_parts
from student_train.students.narrowing.narrow import Narrowing, narrow, why_not
from student_train.students.narrowing.parts import find_parts
from student_train.students.narrowing.sample import TokenSample


def find_obstacle(student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Why the student's layers cannot be sliced from the teacher's; None if they can."""
    ours, theirs = find_parts(student), find_parts(teacher)
    if ours is not None and theirs is not None:
        return why_not(ours, theirs)
    mine, its = find_decoder_parts(student), find_decoder_parts(teacher)
    if mine is not None and its is not None:
        return why_no_decoder(mine, its)
    return f"layers of family {teacher.config.model_type!r} cannot be sliced"


def slice_student(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int], sample: TokenSample, *, with_head: bool
) -> Narrowing:
    """Set the student's weights, as `narrow` and `narrow_decoder` say. Both models are on the sample's device."""
    ours, theirs = find_parts(student), find_parts(teacher)
    if ours is not None and theirs is not None:
        return narrow(ours, theirs, layers, sample, with_head=with_head)
    mine, its = find_decoder_parts(student), find_decoder_parts(teacher)
    assert mine is not None
    assert its is not None
    return narrow_decoder(mine, its, layers, sample, with_head=with_head)
