"""Isolated rows against a plain walk over the documents, and what a document in a row reads as."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.corpus.corpus import RowBlock, pack_corpus
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.next_tokens import next_token_places
from teacher_cache.corpus.packing import RowSpans, cut_at, cut_isolated
from teacher_cache.errors import CorpusError, SettingsError

Segment = list[int]
BOS, EOS = 2, 3


def plain_rows(
    documents: Sequence[Segment], frame: RowFrame, seq_len: int, whole: Sequence[int]
) -> list[list[Segment]]:
    """Each row as its segments, filled document by document; a whole document has all around it already."""
    prefix, suffix, ending = list(frame.prefix), list(frame.suffix), list(frame.ending)
    rows: list[list[Segment]] = [[]]

    def room() -> int:
        return seq_len - sum(map(len, rows[-1]))

    for document, complete in zip(documents, whole, strict=True):
        if complete:
            if rows[-1] and len(document) > room():
                rows.append([])
            rest, before = document, list[int]()
            while len(before) + len(rest) > room():
                kept = room() - len(before)
                rows[-1].append([*before, *rest[:kept]])
                rows.append([])
                rest, before = rest[kept:], prefix
            rows[-1].append([*before, *rest])
            continue
        if rows[-1] and room() <= len(prefix) + len(suffix):
            rows.append([])
        rest = document
        while len(prefix) + len(rest) + len(ending) > room():
            kept = room() - len(prefix) - len(suffix)
            rows[-1].append([*prefix, *rest[:kept], *suffix])
            rows.append([])
            rest = rest[kept:]
            if not rest:
                break
        if rest:
            rows[-1].append([*prefix, *rest, *ending])
    return [row for row in rows if row]


def segments_of(block: RowBlock) -> list[list[Segment]]:
    """The same of what was packed, in the order of row ids."""
    assert block.starts_BT is not None
    rows = []
    for row in np.argsort(block.row_id_B):
        length = int(block.length_B[row])
        begins = [*np.flatnonzero(block.starts_BT[row]).tolist(), length]
        assert begins[0] == 0
        assert begins == sorted(set(begins))  # none in the padding
        rows.append([block.input_ids_BT[row, a:b].tolist() for a, b in pairwise(begins)])
    return rows


def laid_out(spans: RowSpans, stream: list[int], starts: list[int], frame: RowFrame) -> list[list[Segment]]:
    rows = []
    for start, stop, prefixed, suffixed in zip(
        spans.start_R, spans.stop_R, spans.prefixed_R, spans.suffixed_R, strict=True
    ):
        begins = [start, *(begin for begin in starts if start < begin < stop), stop]
        row = [stream[a:b] for a, b in pairwise(begins)]
        row[0] = [*(frame.prefix if prefixed else ()), *row[0]]
        row[-1] = [*row[-1], *(frame.suffix if suffixed else ())]
        rows.append(row)
    return rows


FRAMES = [((), (), (9,)), ((8,), (), (9,)), ((8,), (9,), (9,)), ((8, 8), (9, 7), (9, 7)), ((8,), (), (9, 7))]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), around=st.sampled_from(FRAMES),
    room=st.integers(1, 14), whole=st.integers(0, 2**12 - 1),
)  # fmt: skip
def test_isolated_rows_are_those_of_a_plain_walk(lengths, around, room: int, whole: int) -> None:
    prefix, suffix, ending = around
    frame = RowFrame(prefix=prefix, suffix=suffix, separator=9, ending=ending, padding=0)
    seq_len = len(prefix) + len(suffix) + room
    # text may hold the very ids that stand around it
    documents = [[7 + (number + at) % 9 for at in range(length)] for number, length in enumerate(lengths)]
    complete = [0 if suffix else (whole >> number) & 1 for number in range(len(documents))]
    stream, starts = list[int](), list[int]()
    for document, one in zip(documents, complete, strict=True):
        starts.append(len(stream))
        stream += document if one else [*prefix, *document, *ending]
    for some in (complete, None) if not any(complete) else (complete,):
        spans = cut_isolated(np.array(starts), len(stream), frame=frame, seq_len=seq_len, whole=some)
        rows = laid_out(spans, stream, starts, frame)
        assert rows == plain_rows(documents, frame, seq_len, complete)
        assert max(sum(map(len, row)) for row in rows) <= seq_len
        assert spans.start_R.dtype == np.int64
    kept = [token for row in rows for segment in row for token in segment]
    assert len(kept) >= sum(map(len, documents))


def test_cut_rows_meet() -> None:
    spans = cut_at(np.array([0, 4, 5]), 9, framed=True)
    assert (spans.start_R.tolist(), spans.stop_R.tolist()) == ([0, 4, 5], [4, 5, 9])
    assert spans.prefixed_R.all()
    assert spans.suffixed_R.all()
    assert len(spans) == 3


def write_documents(path: Path, seed: int = 0) -> list[str]:
    """Documents of few and many tokens; some hold the special tokens themselves."""
    draw = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "<eos>", "<bos>"]
    texts = [" ".join(draw.choices(words, k=draw.choice((1, 2, 5, 20, 90)))) for _ in range(80)]
    path.write_text("\n".join(texts) + "\n")
    return texts


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("seq_len", [2, 17, 64])
def test_documents_of_a_decoder_read_as_if_alone(template: str, seq_len: int, causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer(template, pad=False)
    texts = write_documents(tmp_path / "a.txt")
    rows = pack_corpus(
        [str(tmp_path / "a.txt")], tokenizer, seq_len=seq_len, row_mode="packed", seed=5, segments="isolated",
        causal=True,
    )  # fmt: skip
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    frame = RowFrame.of(tokenizer, causal=True)
    block = rows.read(0, len(rows))
    assert segments_of(block) == plain_rows(documents, frame, seq_len, [0] * len(documents))
    assert (block.input_ids_BT[np.arange(seq_len) >= block.length_B[:, None]] == EOS).all()
    if seq_len == 64:
        alone = [tokenizer(text)["input_ids"] for text in texts]
        alone = [ids if ids[-1] == EOS and "A <eos>" in template else [*ids, EOS] for ids in alone]
        found = [segment for row in segments_of(block) for segment in row]
        assert sum(segment in alone for segment in found) > 45


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_documents_of_an_encoder_read_as_if_alone(family: str, tiny_tokenizer, tiny_corpus: Path) -> None:
    tokenizer = tiny_tokenizer(family)
    rows = pack_corpus(
        [str(tiny_corpus)], tokenizer, seq_len=32, row_mode="packed", seed=5, segments="isolated"
    )  # fmt: skip
    texts = tiny_corpus.read_text().splitlines()
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    packed = segments_of(rows.read(0, len(rows)))
    assert packed == plain_rows(documents, RowFrame.of(tokenizer), 32, [0] * len(documents))
    alone = [tokenizer(text)["input_ids"] for text in texts]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    segments = [segment for row in packed for segment in row]
    assert all(segment[0] == cls and segment[-1] == sep and len(segment) > 2 for segment in segments)
    assert sum(segment in alone for segment in segments) > 40


def test_rows_of_a_document_are_one_segment_and_end_unless_cut(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer("<bos> $A")
    texts = write_documents(tmp_path / "a.txt")
    for segments in ("joined", "isolated"):
        rows = pack_corpus(
            [str(tmp_path / "a.txt")],
            tokenizer,
            seq_len=16,
            row_mode="document",
            seed=5,
            segments=segments,
            causal=True,
        )
        block = rows.read(0, len(rows))
        expected = [[*tokenizer(text)["input_ids"], EOS][:16] for text in texts]
        for row, row_id in enumerate(block.row_id_B):
            assert block.input_ids_BT[row, : block.length_B[row]].tolist() == expected[row_id]
        if segments == "joined":
            assert block.starts_BT is None
        else:
            assert np.array_equal(block.starts_BT, np.arange(16) < np.ones((len(rows), 1)))


def test_joined_rows_of_a_decoder_are_the_cut_stream(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer("<bos> $A <eos>")
    texts = write_documents(tmp_path / "a.txt")
    rows = pack_corpus([str(tmp_path / "a.txt")], tokenizer, seq_len=16, row_mode="packed", seed=5, causal=True)
    stream: list[int] = []
    for text in texts:
        stream += ([EOS] if stream else []) + tokenizer(text, add_special_tokens=False)["input_ids"]
    block = rows.read(0, len(rows))
    assert block.starts_BT is None
    for row, row_id in enumerate(block.row_id_B):
        ids = block.input_ids_BT[row, : block.length_B[row]].tolist()
        assert ids == [BOS, *stream[15 * row_id : 15 * row_id + 15]]


def test_any_range_and_part_reads_the_same_segments(causal_tokenizer, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt")
    rows = pack_corpus(
        [str(tmp_path / "a.txt")], causal_tokenizer("<bos> $A"), seq_len=24, row_mode="packed", seed=1,
        segments="isolated", causal=True,
    )  # fmt: skip
    whole = rows.read(0, len(rows))
    part = rows.part(2, 3)
    for block, at in ((rows.read(7, 19), 7), (part.read(0, len(part)), part.first_row)):
        for name in ("input_ids_BT", "length_B", "row_id_B", "document_B", "starts_BT"):
            values = getattr(block, name)
            np.testing.assert_array_equal(values, getattr(whole, name)[at : at + len(values)])


def test_fingerprint_tells_isolated_rows_from_joined_ones(causal_tokenizer, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt")
    seen = {
        pack_corpus(
            [str(tmp_path / "a.txt")], causal_tokenizer(), seq_len=24, row_mode="packed", seed=1, segments=segments,
            causal=causal,
        ).record.fingerprint
        for segments in ("joined", "isolated")
        for causal in (True, False)
    }  # fmt: skip
    assert len(seen) == 2


# ---- conversations --------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' + message['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def write_chats(path: Path) -> list[list[tuple[str, bool]]]:
    """Conversations, and their pieces with what is learnt."""
    draw, found = random.Random(2), []
    with path.open("w") as file:
        for number in range(50):
            messages = [
                {"role": ("user", "assistant")[at % 2], "content": " ".join(["cat"] * draw.choice((0, 1, 3, 30)))}
                for at in range(2 + number % 3)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
            pieces = []
            for message in messages:
                said = message["role"] == "assistant"
                pieces += [(f"<bos>{message['role']}\n", False), (message["content"] + "<eos>", said), ("\n", False)]
            found.append(pieces)
    return found


@pytest.mark.parametrize("segments", ["isolated", "joined"])
@pytest.mark.parametrize("row_mode", ["packed", "document"])
def test_text_and_conversations_in_rows(segments: str, row_mode: str, causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer("<bos> $A")
    tokenizer.chat_template = TEMPLATE
    chats, texts, notes = write_chats(tmp_path / "a.jsonl"), write_documents(tmp_path / "b.txt"), list[str]()
    seq_len, frame = 48, RowFrame.of(tokenizer, causal=True)
    rows = pack_corpus(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], tokenizer, seq_len=seq_len, row_mode=row_mode, seed=5,
        segments=segments, causal=True, note=notes.append,
    )  # fmt: skip

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # a token's id and whether it is learnt, as one number that a plain walk carries along
    talks = [[2 * one + said for text, said in pieces for one in encoded(text)] for pieces in chats]
    documents = [[2 * one + 1 for one in encoded(text)] for text in texts]
    marked = RowFrame(prefix=(2 * BOS,), suffix=(), separator=2 * EOS, ending=(2 * EOS + 1,), padding=0)
    if row_mode == "document":
        alone = [[2 * BOS, *one, 2 * EOS + 1] for one in documents]
        expected = [[one[:seq_len]] for one in [*talks, *alone]]
    elif segments == "isolated":
        expected = plain_rows([*talks, *documents], marked, seq_len, [1] * len(talks) + [0] * len(documents))
    else:
        stream: list[int] = []
        for number, one in enumerate([*talks, *documents]):
            stream += [*([2 * EOS + (number >= len(talks))] if stream else []), *one]
        step = seq_len - len(frame.prefix)
        expected = [[[2 * BOS, *stream[at : at + step]]] for at in range(0, len(stream), step)]
    block = rows.read(0, len(rows))
    assert block.learnt_BT is not None
    both = RowBlock(**{**vars(block), "input_ids_BT": 2 * block.input_ids_BT + block.learnt_BT})
    if segments == "joined":
        assert both.starts_BT is None
        starts_BT = np.arange(seq_len) < np.ones((len(rows), 1))
        both = RowBlock(**{**vars(both), "starts_BT": starts_BT})
    found = segments_of(both)
    # the prefix of a document is never a next token: whether it is learnt does not matter
    assert [[[one & ~1 if one // 2 == BOS else one for one in part] for part in row] for row in found] == [
        [[one & ~1 if one // 2 == BOS else one for one in part] for part in row] for row in expected
    ]
    assert not block.learnt_BT[np.arange(seq_len) >= block.length_B[:, None]].any()
    kept_BT = next_token_places(block, positions="all", seed=0)
    silent = int((~kept_BT.any(axis=1)).sum())
    said = f"{silent} of {len(rows)} rows hold no token that is to be learnt, only what answers are given to"
    assert notes == [f"{tmp_path / 'a.jsonl'}: conversations are read from column 'messages'", *([said] * (silent > 0))]
    assert silent > 0 or segments == "joined"


def test_rows_that_teach_nothing_at_all_are_refused(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "cat " * 40}, {"role": "assistant", "content": "cat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    settings = {"seq_len": 16, "row_mode": "document", "seed": 0, "causal": True}
    with pytest.raises(CorpusError, match="none of the 1 rows holds a token that is to be learnt"):
        pack_corpus([str(tmp_path / "a.jsonl")], tokenizer, **settings)
    with pytest.raises(SettingsError, match="this teacher is an encoder"):
        pack_corpus([str(tmp_path / "a.jsonl")], tokenizer, **{**settings, "causal": False, "chat": True})


def test_fingerprint_sees_answers(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer = causal_tokenizer()
    write_chats(tmp_path / "a.jsonl")
    seen = set()
    for template in (TEMPLATE, TEMPLATE.replace("'<bos>assistant\n'", "'<bos>'")):
        tokenizer.chat_template = template
        rows = pack_corpus(
            [str(tmp_path / "a.jsonl")], tokenizer, seq_len=48, row_mode="packed", seed=5, segments="isolated",
            causal=True, chat=True,
        )  # fmt: skip
        seen.add(rows.record.fingerprint)
    assert len(seen) == 2
