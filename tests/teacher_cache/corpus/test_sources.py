"""Text and conversations in the temporary file, in the order of reading."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.corpus.conversations import Chat, Completion, Conversation
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.sources import EVERYTHING, Quota, spool_sources
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
        read = spool_sources(
            sources, tokenizer, frame, spool, quotas=[EVERYTHING] * 3, progress=lambda *counts: seen.append(counts),
            note=notes.append,
        )  # fmt: skip
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
    assert [source.first_document for source in read] == [0, 3, 3]
    assert sum(source.tokens for source in read) == spool.tokens
    assert read[1].tokens == 0 and not any(source.cut for source in read)
    assert [documents for documents, _ in seen] == [1, 3, 5, 6]
    assert notes == []


@pytest.mark.parametrize(
    "quota, documents",
    [
        (Quota(documents=0), 0),
        (Quota(documents=1), 1),
        (Quota(documents=3), 3),
        (Quota(documents=4), 4),
        (Quota(documents=5), 5),
        (Quota(tokens=1), 1),
    ],
)
def test_a_quota_ends_a_source_within_a_batch_and_the_next_one_begins(
    causal_tokenizer, quota: Quota, documents: int
) -> None:
    """Text, conversations, text: whichever of them the quota ends in."""
    tokenizer = causal_tokenizer()
    frame = RowFrame.of(tokenizer, causal=True)
    chats = [Completion(prompt="the", completion=completion, origin="here") for completion in (" mat", " hat")]
    sources = [["a cat", "a dog", *chats, "a cow"], ["the end"]]
    texts = [*["a cat", "a dog", "the mat", "the hat", "a cow"][:documents], "the end"]
    with TokenSpool() as spool:
        quotas = [quota, EVERYTHING]
        read = spool_sources(sources, tokenizer, frame, spool, quotas=quotas, progress=None, note=print)
        ids, starts = spool.ids(), spool.starts()
    parts = [part.tolist() for part in np.split(ids, starts[1:])]
    ends = [[EOS] if text in ("the mat", "the hat") else [] for text in texts]
    assert parts == [[*tokenizer(text)["input_ids"], *end] for text, end in zip(texts, ends, strict=True)]
    assert [source.first_document for source in read] == [0, documents]
    assert [source.cut for source in read] == [True, False]


def test_text_alone_needs_no_template_and_conversations_do(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    frame = RowFrame.of(tokenizer, causal=True)
    chat = Conversation(messages=[{"role": "assistant", "content": "a"}], origin="here")
    with TokenSpool() as spool:
        spool_sources([["a cat"]], tokenizer, frame, spool, quotas=[EVERYTHING], progress=None, note=print)
        assert spool.learnt() is None
        with pytest.raises(TeacherError, match="no chat template"):
            spool_sources([[chat]], tokenizer, frame, spool, quotas=[EVERYTHING], progress=None, note=print)
