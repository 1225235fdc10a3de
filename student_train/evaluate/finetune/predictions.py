"""What a fine-tuned model predicts, from its outputs: classes, scores, or a tag for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from student_train.evaluate.finetune.inputs import Inputs
from student_train.evaluate.finetune.tasks import Task


def decide(outputs: NDArray[Any], inputs: Inputs, task: Task) -> list[Any]:
    """Class numbers, scores, or class numbers by word (None for one that has no token).

    Args:
        outputs: [N, C] logits of texts, [N, 1] scores, or [N, T, C] logits of tokens.
        inputs: of the same examples.
        task: what was asked.
    """
    if task.kind == "regression":
        return [float(value) for value in outputs.reshape(-1)]
    classes = outputs.argmax(-1)
    if task.kind == "classification":
        return [int(number) for number in classes]
    return [
        [None if token is None else int(row[token]) for token in tokens]
        for row, tokens in zip(classes, inputs.word_tokens, strict=True)
    ]


def name_tags(predictions: Sequence[Sequence[int | None]], tags: Sequence[str]) -> list[list[str]]:
    """Predicted tags by word; a word without a token is no part of an entity."""
    return [["O" if number is None else tags[number] for number in sentence] for sentence in predictions]
