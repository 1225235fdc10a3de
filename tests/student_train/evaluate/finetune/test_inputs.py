"""What models read: words find their tokens whatever the tokenizer does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from student_train.evaluate.finetune.examples import Examples
from student_train.evaluate.finetune.inputs import IGNORED, encode
from student_train.evaluate.finetune.tasks import TASKS

TAGS = ("B-PER", "O")


def tagged(*words: str) -> Examples:
    tags = tuple("B-PER" if word[0].isupper() else "O" for word in words)
    return Examples(origin="test", inputs=(words,), labels=(tags,))


def first_tokens(tokenizer: Any, examples: Examples, max_length: int = 32) -> list[str | None]:
    inputs = encode(tokenizer, examples, TASKS["ner"], tags=TAGS, max_length=max_length)
    names = tokenizer.convert_ids_to_tokens(inputs.features[0]["input_ids"])
    # exactly the first tokens of words are labelled
    labelled = {token for token, label in enumerate(inputs.features[0]["labels"]) if label != IGNORED}
    assert labelled == {token for token in inputs.word_tokens[0] if token is not None}
    return [None if token is None else names[token] for token in inputs.word_tokens[0]]


def test_words_of_several_pieces(shared_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_teacher)
    examples = tagged("Schwarzenegger", "in", "Zürich", "\u200b", "won't", "X")
    # a word that the tokenizer drops has no token; accents and capitals go without moving the others
    assert first_tokens(tokenizer, examples) == ["schwarz", "in", "zurich", None, "won", "x"]
    labels = encode(tokenizer, examples, TASKS["ner"], tags=TAGS, max_length=32).features[0]["labels"]
    assert [label for label in labels if label != IGNORED] == [0, 1, 0, 1, 0]


def sentence_pieces() -> Tokenizer:
    """As XLM-R has it: spaces are parts of pieces, and "▁" alone is one."""
    pieces = ["<unk>", "▁", "▁An", "gela", "中", "▁Мо", "сква", "(", "▁x"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def bytes_of_text() -> Tokenizer:
    """As RoBERTa and ModernBERT have it: a space is a token before pieces that do not hold one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: number for number, piece in enumerate([*alphabet, "An", "Ġx"])}
    tokenizer = Tokenizer(models.BPE(pieces, [("A", "n"), ("Ġ", "x")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize(
    "make, expected",
    [
        (sentence_pieces, ["▁An", "中", "▁Мо", "(", "▁x"]),
        (bytes_of_text, ["An", "ä", "Ð", "(", "Ġx"]),  # the first bytes of the second and the third word
    ],
)
def test_tokens_that_hold_the_space_before_a_word(make: Callable[[], Tokenizer], expected: list[str]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    assert first_tokens(tokenizer, tagged("Angela", "中", "Москва", "(", "x")) == expected


def test_what_is_cut_has_no_token(tiny_tokenizer: Any) -> None:
    examples = tagged(*["babo"] * 10)
    inputs = encode(tiny_tokenizer(), examples, TASKS["ner"], tags=TAGS, max_length=8)
    assert inputs.word_tokens[0] == (1, 2, 3, 4, 5, 6, None, None, None, None)
    assert inputs.cut == 1


def test_pairs(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer()
    examples = Examples(origin="test", inputs=(("babo", "bada"), ("babo " * 30, "bada")), labels=(1, 0))
    inputs = encode(tokenizer, examples, TASKS["rte"], tags=(), max_length=16)
    words = tokenizer.convert_ids_to_tokens(inputs.features[0]["input_ids"])
    assert words == ["[CLS]", "babo", "[SEP]", "bada", "[SEP]"]
    assert [each["labels"] for each in inputs.features] == [1, 0]
    assert len(inputs.features[1]["input_ids"]) == 16 and inputs.cut == 1
