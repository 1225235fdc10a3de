"""A tokenizer that is cut to a text gives the same pieces of it, and of whatever else has these pieces."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.needed import needed_ids
from student_train.students.vocabulary.tokenizer import trimmed_description
from teacher_cache.errors import StudentError
from tests.student_train.students.vocabulary import made


@pytest.mark.parametrize("kind", made.KINDS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), lines=st.integers(1, 12))
def test_kept_text_keeps_its_pieces(kind: str, seed: int, lines: int) -> None:
    draw = random.Random(seed)
    texts = draw.sample(made.documents(), lines)
    if kind == "whole-bpe":
        texts.append("zzqq")
    cut, kept = made.cut(kind, texts)
    words = [word for text in texts for word in text.split()]
    other = [" ".join(draw.choices(words, k=7)) for _ in range(20)]
    for text, before, after in zip(
        texts + other, made.ids_of(made.whole(kind), texts + other), made.ids_of(cut, texts + other), strict=True
    ):
        assert kept.ids_K[after].tolist() == before, text
    # or nothing would have been tried
    assert len(kept) < made.entries(kind)


@pytest.mark.parametrize("kind", ["byte-bpe", "suffix-bpe", "prefix-bpe", "fallback-bpe", "wordpiece"])
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_nothing_becomes_unknown(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    cut, kept = made.cut(kind, draw.sample(made.documents(), 2))
    letters = sorted({letter for text in made.documents() for letter in text if letter != " "})
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(30)]
    unknown = made.whole(kind).token_to_id("<unk>")
    for text, before, after in zip(texts, made.ids_of(made.whole(kind), texts), made.ids_of(cut, texts), strict=True):
        if unknown not in before:
            assert unknown not in kept.ids_K[after].tolist(), text


def test_letters_of_the_scripts_of_a_text_stay_where_bytes_do_not_stand_in() -> None:
    texts = ["abc ж abc", "cab"]
    cut, kept = made.cut("unigram", texts)
    pieces = made.whole("unigram").get_vocab()
    here, _ = cut.get_vocab(), kept
    assert {"a", "z", "é", "ß", "ж", "д"} & pieces.keys() <= here.keys()
    assert {"中", "国"} <= pieces.keys() and not {"中", "国"} & here.keys()


def unigram(pieces: dict[str, float]) -> dict[str, object]:
    fields = json.loads(Tokenizer.from_str(json.dumps(made.description("unigram"))).to_str())
    return {
        **fields,
        "added_tokens": [],
        "post_processor": None,
        "pre_tokenizer": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [*pieces.items()]},
    }


def test_the_score_of_unknown_characters_stays_where_it_was() -> None:
    """Of `waжy`, [w][aж][y] is better than [wa][ж][y]. Unknown is 10 below the least probable piece, [zz]."""
    pieces = {"<unk>": 0.0, "w": -13.0, "aж": -13.0, "y": -13.0, "wa": -1.0, "ж": -29.0, "zz": -30.0, "a": -13.0}
    fields = unigram(pieces)
    names = list(pieces)
    counts = np.array([0, 10**5, 1, 10**5, 10**5, 0, 0, 10**5])
    needed = needed_ids(fields, counts, np.flatnonzero(counts).tolist(), "made")
    assert names.index("ж") not in needed
    for kept, same in ((needed, True), (needed - {names.index("zz")}, False)):
        record = KeptIds.of(kept, len(pieces), 0)
        cut = Tokenizer.from_str(json.dumps(trimmed_description(fields, record)))
        before = Tokenizer.from_str(json.dumps(fields)).encode("waжy").tokens
        assert before == ["w", "aж", "y"]
        assert (cut.encode("waжy").tokens == before) == same


def test_a_merge_that_leads_to_a_kept_piece_stays() -> None:
    fields = {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {
                piece: number for number, piece in enumerate(["a", "b", "c", "d", "ab", "cd", "bc", "abcd", "bcd"])
            },
            "merges": [["a", "b"], ["c", "d"], ["b", "c"], ["ab", "cd"], ["b", "cd"]],
        },
    }
    found = needed_ids(fields, np.zeros(9, dtype=np.int64), {7}, "made")
    # letters, and of two ways to abcd the one that is gone
    assert found == {0, 1, 2, 3, 4, 5, 7}


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(
        StudentError, match="'made' has a model of the kind 'Sorted'.*WordPiece, BPE, Unigram, WordLevel"
    ):
        needed_ids({"model": {"type": "Sorted"}, "added_tokens": []}, np.zeros(3, dtype=np.int64), {1}, "made")
