"""Tokenizers with fewer ids as Transformers reads them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.tokenizer import description_of, trim_tokenizer, trimmed_description
from teacher_cache.errors import StudentError
from tests.student_train.students.vocabulary import made


@pytest.mark.parametrize("kind", ["byte-bpe", "wordpiece", "unigram", "wordlevel"])
def test_special_tokens_and_their_ids_follow(kind: str, tmp_path: Path) -> None:
    before = made.tokenizer(kind)
    before.add_tokens(["<extra>"])
    texts = list(made.documents()[:3])
    _, kept = made.cut(kind, texts)
    kept = KeptIds.of([*kept.ids_K.tolist(), len(before) - 1], len(before), kept.stand_in)
    after = trim_tokenizer(before, kept, "made")
    after.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    for found in (after, again):
        assert len(found) == len(kept) and max(found.get_vocab().values()) == len(kept) - 1
        for name in ("bos", "pad", "eos", "unk", "mask"):
            own, old = (getattr(each, f"{name}_token_id") for each in (found, before))
            assert kept.ids_K[own] == old, name
        ids = found(texts[0], f"{texts[1]} <extra>").input_ids
        assert kept.ids_K[ids].tolist() == before(texts[0], f"{texts[1]} <extra>").input_ids
        assert found.decode(found(texts[2]).input_ids) == before.decode(before(texts[2]).input_ids)


def test_older_post_processors_and_padding_follow() -> None:
    fields = made.description("wordpiece")
    processor = {
        "type": "Sequence",
        "processors": [
            {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True},
            {"type": "ByteLevel"},
        ],
    }
    padding = {"pad_id": 1, "pad_token": "<pad>"}
    kept = KeptIds.of([0, 2, 3, 9], made.entries("wordpiece"), 3)
    found = trimmed_description({**fields, "post_processor": processor, "padding": padding}, kept)
    assert found["post_processor"]["processors"][0]["sep"] == ["</s>", 1]
    assert found["padding"]["pad_id"] == 0
    kept = KeptIds.of([0, 1, 2, 3, 9], made.entries("wordpiece"), 3)
    found = trimmed_description({**fields, "post_processor": processor, "padding": padding}, kept)
    assert found["post_processor"]["processors"][0]["sep"] == ["</s>", 2]
    assert found["padding"]["pad_id"] == 1


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(StudentError, match="'mine' is a slow one .ByT5Tokenizer."):
        description_of(ByT5Tokenizer(), "mine")


def test_a_class_with_a_way_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has other ids once its files are read is not taken for the same."""
    before = made.tokenizer("wordlevel")
    _, kept = made.cut("wordlevel", made.documents()[:3])
    monkeypatch.setattr(
        "student_train.students.vocabulary.tokenizer.read_tokenizer", lambda *_, **__: made.tokenizer("wordlevel")
    )
    with pytest.raises(StudentError, match="cannot be read again with fewer ids .*have other ids"):
        trim_tokenizer(before, kept, "made")
