"""Examples -> what a model reads: token ids, and for token classification which token speaks for which word.

A word is labelled and predicted at its first token. The words of a sentence are joined by spaces and tokenised as the
text they are, and tokens are found again by their place in it: that needs no switch per tokenizer family. What
--max-length cuts off is counted; a word that was cut, or that has no token, is predicted as 'O', so that what the model
could not read counts as a mistake instead of being left out of the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from student_train.evaluate.finetune.examples import Examples
from student_train.evaluate.finetune.tasks import Task

IGNORED = -100
"""The label of tokens that stand for no word: PyTorch's cross-entropy leaves them out."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Features by example; the token of each word (None if there is none), for tokens; how many examples were cut."""

    features: tuple[Mapping[str, Any], ...]
    word_tokens: tuple[tuple[int | None, ...], ...] = ()
    cut: int


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, task: Task, *, tags: Sequence[str], max_length: int
) -> Inputs:
    """Features of all examples, each with its `labels`; `tags` are the tags by number."""
    if task.kind == "tokens":
        return _encode_words(tokenizer, examples, {tag: number for number, tag in enumerate(tags)}, max_length)
    texts = [list(column) for column in zip(*examples.inputs, strict=True)]
    encoding = tokenizer(*texts, truncation=True, max_length=max_length)
    features = [
        {**{name: column[row] for name, column in encoding.items()}, "labels": label}
        for row, label in enumerate(examples.labels)
    ]
    return Inputs(features=tuple(features), cut=_count_cut(encoding))


def _encode_words(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, numbers: Mapping[str, int], max_length: int
) -> Inputs:
    texts = [" ".join(words) for words in examples.inputs]
    encoding = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    places = encoding.pop("offset_mapping")
    features, word_tokens = [], []
    for row, (words, tags) in enumerate(zip(examples.inputs, examples.labels, strict=True)):
        first = _first_tokens(words, places[row])
        labels = [IGNORED] * len(places[row])
        for token, tag in zip(reversed(first), reversed(tags), strict=True):  # so that of two words, the first one wins
            if token is not None:
                labels[token] = numbers[tag]
        features.append({**{name: column[row] for name, column in encoding.items()}, "labels": labels})
        word_tokens.append(tuple(first))
    return Inputs(features=tuple(features), word_tokens=tuple(word_tokens), cut=_count_cut(encoding))


def _first_tokens(words: Sequence[str], places: Sequence[tuple[int, int]]) -> list[int | None]:
    """Of each word, the first token that covers a character of it."""
    first: list[int | None] = []
    start = token = 0
    for word in words:
        end = start + len(word)
        # special tokens have empty places; places grow, so that what ends before this word ends before all later ones
        while token < len(places) and (places[token][0] == places[token][1] or places[token][1] <= start):
            token += 1
        first.append(token if token < len(places) and places[token][0] < end else None)
        start = end + 1
    return first


def _count_cut(encoding: Any) -> int:
    """How many examples lost tokens; 0 for tokenizers in Python, which do not say."""
    return sum(bool(each.overflowing) for each in encoding.encodings or ())
