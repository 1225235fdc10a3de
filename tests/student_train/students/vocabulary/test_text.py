"""Counts of ids, what covers a text, and how pieces differ."""

from __future__ import annotations

import numpy as np
import pytest

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.text import compare_pieces, count_text, covering
from student_train.students.vocabulary.tokenizer import trim_tokenizer
from tests.student_train.students.vocabulary import made


def test_counts_are_those_of_each_document() -> None:
    tokenizer, texts = made.tokenizer("unigram"), made.documents()[:40]
    counts = count_text(tokenizer, iter(texts), len(tokenizer) + 3)
    plain = np.zeros(len(tokenizer) + 3, dtype=np.int64)
    for ids in made.ids_of(made.whole("unigram"), texts):
        for each in ids:
            plain[each] += 1
    assert (counts == plain).all()


@pytest.mark.parametrize(
    "share, expected", [(1, [3, 0, 4, 1]), (0.99, [3, 0, 4, 1]), (0.9, [3, 0, 4]), (0.5, [3]), (0.51, [3, 0])]
)
def test_covering(share: float, expected: list[int]) -> None:
    assert covering(np.array([2, 1, 0, 5, 2]), share).tolist() == expected


def test_covering_nothing() -> None:
    assert covering(np.zeros(4, dtype=np.int64), 1).tolist() == []


def test_no_difference_is_hidden() -> None:
    before = made.tokenizer("wordlevel")
    texts = list(made.documents()[:30])
    words = texts[0].split()
    dropped = before.convert_tokens_to_ids(words[0])
    _, kept = made.cut("wordlevel", texts, drop=[dropped])
    after = trim_tokenizer(before, kept, "made")
    found = compare_pieces(before, after, kept, texts)
    times = sum(text.split().count(words[0]) for text in texts)
    assert (found.dropped, found.others, found.unknown) == (times, 0, times)
    assert found.documents == sum(words[0] in text.split() for text in texts)
    assert (found.all_documents, found.pieces) == (30, sum(len(text.split()) for text in texts))
    assert not found.same and f"{times:,} more are unknown" in str(found)
    same = compare_pieces(before, before, KeptIds.of(range(len(before)), len(before), 3), texts)
    assert same.same and str(same) == f"the same {found.pieces:,} pieces as before"


def test_kept_neighbours_that_change_are_counted() -> None:
    """Without `ab`, `abc` is spelt a, bc: its c is gone too."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("a", "b"), ("b", "c")], unk_token="<unk>"))
    before = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    kept = KeptIds.of([0, 1, 2, 3, 5], 6, 0)
    found = compare_pieces(before, trim_tokenizer(before, kept, "made"), kept, ["abc", "bc"])
    assert (found.pieces, found.dropped, found.others, found.unknown, found.documents) == (3, 1, 1, 0, 1)
