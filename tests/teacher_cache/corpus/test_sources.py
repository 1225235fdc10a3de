"""Text and conversations in the temporary file, in the order of reading."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.corpus.conversations import Chat, Completion, Conversation
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.sources import spool_sources
from teacher_cache.corpus.tokens import TokenSpool
from teacher_cache.errors import TeacherError

EOS = 3


def test_runs_of_both_kinds_stay_in_order(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    frame, seen, notes = RowFrame.of(tokenizer, causal=True), list[tuple[int, int]](), list[str]()

    def pair(completion: str) -> Chat:
        return Completion(prompt="the", completion=completion, origin="here")

    sources = [["a cat", pair(" mat"), pair(" hat")], [], ["a dog", "a cow", pair(" bat")]]
    with TokenSpool(ending=frame.ending) as spool:
        first, sizes = spool_sources(
            sources, tokenizer, frame, spool, progress=lambda *counts: seen.append(counts), note=notes.append
        )
        ids, starts, learnt = spool.ids(), spool.starts(), spool.learnt()
    texts = ["a cat", "the mat", "the hat", "a dog", "a cow", "the bat"]
    expected = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
    assert [part.tolist() for part in np.split(ids, starts[1:])] == expected
    assert learnt is not None
    prompt = len(tokenizer("the")["input_ids"])
    want = [[not text.startswith("the") or at >= prompt for at in range(len(one))]
            for text, one in zip(texts, expected, strict=True)]  # fmt: skip
    assert [part.tolist() for part in np.split(learnt, starts[1:])] == want
    assert list(spool.whole) == [0, 1, 1, 0, 0, 1]
    assert first == [0, 3, 3]
    assert sum(sizes) == spool.tokens
    assert sizes[1] == 0
    assert [documents for documents, _ in seen] == [1, 3, 5, 6]
    assert notes == []


def test_text_alone_needs_no_template_and_conversations_do(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    frame = RowFrame.of(tokenizer, causal=True)
    chat = Conversation(messages=[{"role": "assistant", "content": "a"}], origin="here")
    with TokenSpool() as spool:
        spool_sources([["a cat"]], tokenizer, frame, spool, progress=None, note=print)
        assert spool.learnt() is None
        with pytest.raises(TeacherError, match="no chat template"):
            spool_sources([[chat]], tokenizer, frame, spool, progress=None, note=print)
