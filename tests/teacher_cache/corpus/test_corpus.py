"""Packing: every row against the plain definition, on tiny and real tokenizers."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from teacher_cache.corpus.corpus import Rows, pack_corpus, tokenizer_fingerprint
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.errors import CorpusError, SettingsError, TeacherError
from teacher_cache.random_bits import uniform_bits


def real_ids(rows: Rows) -> dict[int, list[int]]:
    """Row id -> its ids without padding."""
    block = rows.read(0, len(rows))
    return {
        int(row_id): ids[:length].tolist()
        for row_id, ids, length in zip(block.row_id_B, block.input_ids_BT, block.length_B, strict=True)
    }


def plain_packing(documents: list[list[int]], prefix, suffix, separator: int, seq_len: int) -> list[list[int]]:
    stream: list[int] = []
    for number, document in enumerate(documents):
        stream += ([separator] if number else []) + document
    step = seq_len - len(prefix) - len(suffix)
    return [[*prefix, *stream[at : at + step], *suffix] for at in range(0, len(stream), step)]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("seq_len", [3, 10, 32, 4096])
def test_packed_rows_are_the_cut_stream(family: str, seq_len: int, tiny_tokenizer, tiny_corpus: Path) -> None:
    tokenizer = tiny_tokenizer(family)
    rows = pack_corpus([str(tiny_corpus)], tokenizer, seq_len=seq_len, row_mode="packed", seed=3)
    documents = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in tiny_corpus.open()]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    expected = plain_packing(documents, [cls], [sep], sep, seq_len)
    assert [ids for _, ids in sorted(real_ids(rows).items())] == expected
    assert rows.record.rows == len(rows) == len(expected)
    assert rows.record.documents == 200
    assert rows.record.tokens == sum(map(len, documents))
    block = rows.read(0, len(rows))
    assert block.input_ids_BT.shape == (len(rows), seq_len)
    padding = np.arange(seq_len) >= block.length_B[:, None]
    assert (block.input_ids_BT[padding] == tokenizer.pad_token_id).all()


def test_document_rows_hold_one_truncated_document_each(tiny_tokenizer, tiny_corpus: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = pack_corpus([str(tiny_corpus)], tokenizer, seq_len=16, row_mode="document", seed=0)
    expected = tokenizer(tiny_corpus.read_text().splitlines(), truncation=True, max_length=16)["input_ids"]
    assert [ids for _, ids in sorted(real_ids(rows).items())] == expected
    block = rows.read(0, len(rows))
    np.testing.assert_array_equal(block.document_B, block.row_id_B)


def test_document_of_a_packed_row_is_the_first_with_text_in_it(tiny_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("babo babo babo\nbada bada\nbafe bafe bafe bafe\n")
    tokenizer = tiny_tokenizer()
    rows = pack_corpus([str(tmp_path / "a.txt")], tokenizer, seq_len=5, row_mode="packed", seed=0)
    block = rows.read(0, len(rows))
    order = np.argsort(block.row_id_B)
    # babo babo babo | [SEP] bada bada | [SEP] bafe bafe | bafe bafe
    assert [tokenizer.decode(ids) for ids in block.input_ids_BT[order]] == [
        "[CLS] babo babo babo [SEP]",
        "[CLS] [SEP] bada bada [SEP]",
        "[CLS] [SEP] bafe bafe [SEP]",
        "[CLS] bafe bafe [SEP] [PAD]",
    ]
    assert block.document_B[order].tolist() == [0, 1, 2, 2]
    assert block.length_B[order].tolist() == [5, 5, 5, 4]


def test_order_is_a_function_of_seed_and_row_id(tiny_tokenizer, tiny_corpus: Path) -> None:
    def order(seed: int, max_rows: int | None = None) -> list[int]:
        rows = pack_corpus(
            [str(tiny_corpus)], tiny_tokenizer(), seq_len=16, row_mode="packed", seed=seed, max_rows=max_rows
        )
        return rows.read(0, len(rows)).row_id_B.tolist()

    whole = order(1)
    assert sorted(whole) == list(range(len(whole)))
    assert whole == sorted(whole, key=lambda row: int(uniform_bits(1, row)))
    assert order(1, 10) == whole[:10]
    assert order(1, 10**9) == whole
    assert order(2) != whole


def test_any_range_reads_the_same_rows(tiny_tokenizer, tiny_corpus: Path) -> None:
    rows = pack_corpus([str(tiny_corpus)], tiny_tokenizer(), seq_len=16, row_mode="packed", seed=0, max_rows=50)
    whole = rows.read(0, 50)
    for start, stop in (0, 1), (7, 19), (49, 50), (20, 20):
        part = rows.read(start, stop)
        for name in ("input_ids_BT", "length_B", "row_id_B", "document_B"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start:stop])
    assert (whole.input_ids_BT.dtype, whole.length_B.dtype) == (np.int32, np.int32)
    assert (whole.row_id_B.dtype, whole.document_B.dtype) == (np.int64, np.int64)


def test_fingerprint_depends_on_the_text_alone(tiny_tokenizer, tiny_corpus: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    settings = {"seq_len": 16, "row_mode": "packed", "seed": 0}
    first = pack_corpus([str(tiny_corpus)], tokenizer, **settings).record.fingerprint
    lines = tiny_corpus.read_text().splitlines()
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    other = {"seq_len": 64, "row_mode": "document", "seed": 9, "max_rows": 3}
    assert pack_corpus([str(path)], tokenizer, **other).record.fingerprint == first
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines[1:], lines[0]]))
    assert pack_corpus([str(path)], tokenizer, **settings).record.fingerprint != first


@pytest.mark.parametrize("row_mode", ["packed", "document"])
def test_a_shuffle_buffer_reads_the_beginning_alone(row_mode: str, tiny_tokenizer, tiny_corpus: Path, tmp_path) -> None:
    """As far as rows and buffer take; rows are those of the documents that were read, as if there were no others."""
    tokenizer, settings = tiny_tokenizer(), {"seq_len": 16, "row_mode": row_mode, "seed": 4, "max_rows": 10}
    lines = tiny_corpus.read_text().splitlines()
    rows = pack_corpus([str(tiny_corpus)], tokenizer, shuffle_buffer=20, **settings)
    read = rows.record.documents
    sizes = [len(ids) for ids in tokenizer(lines, add_special_tokens=False).input_ids]
    # 14 of 16 positions are text
    assert sum(sizes[: read - 1]) < 30 * 14 <= sum(sizes[:read]) if row_mode == "packed" else read == 30
    (tmp_path / "beginning.txt").write_text("\n".join(lines[:read]) + "\n")
    plain = pack_corpus([str(tmp_path / "beginning.txt")], tokenizer, **settings)
    for name in ("input_ids_BT", "length_B", "row_id_B", "document_B"):
        np.testing.assert_array_equal(getattr(rows.read(0, 10), name), getattr(plain.read(0, 10), name))
    assert rows.record.shuffle_buffer == 20 and plain.record.shuffle_buffer is None
    assert replace(rows.record, shuffle_buffer=None, specs=()) == replace(plain.record, specs=())


def test_a_shuffle_buffer_beyond_the_corpus_changes_nothing(tiny_tokenizer, tiny_corpus: Path) -> None:
    settings = {"seq_len": 16, "row_mode": "packed", "seed": 4, "max_rows": 10}
    notes: list[str] = []
    records = [
        pack_corpus([str(tiny_corpus)], tiny_tokenizer(), note=notes.append, shuffle_buffer=buffer, **settings).record
        for buffer in (None, 10**6)
    ]
    assert replace(records[1], shuffle_buffer=None) == records[0] and not notes
    with pytest.raises(SettingsError, match="--shuffle-buffer 5 is added to --max-rows"):
        pack_corpus([str(tiny_corpus)], tiny_tokenizer(), shuffle_buffer=5, **{**settings, "max_rows": None})


def test_progress_counts_up_to_the_record(tiny_tokenizer, tiny_corpus: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = pack_corpus(
        [str(tiny_corpus)] * 12, tiny_tokenizer(), seq_len=16, row_mode="packed", seed=0,
        progress=lambda documents, tokens: seen.append((documents, tokens)),
    )  # fmt: skip
    assert len(seen) == 2  # 2,400 documents in batches of at most 2,048
    assert seen == sorted(seen)
    assert seen[-1] == (rows.record.documents, rows.record.tokens)


def test_empty_corpus_and_too_short_rows_are_refused(tiny_tokenizer, tmp_path: Path, tiny_corpus: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=r"blank\.txt.*empty"):
        pack_corpus([str(tmp_path / "blank.txt")], tiny_tokenizer(), seq_len=16, row_mode="packed", seed=0)
    with pytest.raises(SettingsError, match="--seq-len 2 leaves no room"):
        pack_corpus([str(tiny_corpus)], tiny_tokenizer(), seq_len=2, row_mode="packed", seed=0)


@pytest.mark.parametrize("missing", ["pad_token", "sep_token"])
def test_tokenizers_without_a_needed_token_are_refused(missing: str, tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, missing, None)
    with pytest.raises(TeacherError, match=missing.removesuffix("_token")):
        RowFrame.of(tokenizer)


def test_tokenizer_fingerprint_survives_saving_and_use(tiny_tokenizer, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["babo", "babo bada"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before
    assert tokenizer_fingerprint(tiny_tokenizer("roberta")) != before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


# ---- real tokenizers and text ---------------------------------------------------------------------------------------


def test_real_teacher_tokenizer_on_real_text(shared_teacher: Path, shared_corpus: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_teacher)
    with gzip.open(shared_corpus, "rt") as file:
        (tmp_path / "some.txt").write_text("".join(itertools.islice(file, 500)))
    rows = pack_corpus([str(tmp_path / "some.txt")], tokenizer, seq_len=128, row_mode="packed", seed=0)
    assert rows.record.documents == 500
    frame = RowFrame.of(tokenizer)
    assert (frame.prefix, frame.suffix, frame.separator, frame.padding) == ((101,), (102,), 102, 0)
    ids = [row[1:-1] for _, row in sorted(real_ids(rows).items())]
    assert all(len(row) == 126 for row in ids[:-1])
    stream = [token for row in ids for token in row]
    assert stream.count(frame.separator) == rows.record.documents - 1
    assert len(stream) == rows.record.tokens + rows.record.documents - 1
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "saved")) == tokenizer_fingerprint(tokenizer)


def test_novels_with_the_xlm_r_tokenizer(shared_xlm_tokenizer: Path, shared_data: Path) -> None:
    """Lines of up to 1.3 MB and ids beyond 16 bits; the text comes back from the rows."""
    tokenizer = AutoTokenizer.from_pretrained(shared_xlm_tokenizer)
    path = shared_data / "corpus" / "es-novels.txt.gz"
    rows = pack_corpus([str(path)], tokenizer, seq_len=512, row_mode="packed", seed=0)
    frame = RowFrame.of(tokenizer)
    assert (frame.prefix, frame.suffix, frame.separator, frame.padding) == ((0,), (2,), 2, 1)
    assert rows.record.documents == 2
    ids = real_ids(rows)
    assert max(map(max, ids.values())) > 2**16
    # the first line is a short note, the second a novel
    stream = [token for _, row in sorted(ids.items()) for token in row[1:-1]]
    novel = stream[stream.index(frame.separator) + 1 :]
    assert len(novel) > 100_000
    words = tokenizer.decode(novel[:10_000]).split()
    with gzip.open(path, "rt") as file:
        original = file.readlines()[1].split()
    # the last word may be cut
    assert words[:-1] == original[: len(words) - 1]


def test_what_the_tokenizer_does_not_know_is_said(tiny_tokenizer, tmp_path: Path) -> None:
    def notes_of(text: str) -> list[str]:
        notes: list[str] = []
        (tmp_path / "a.txt").write_text(text)
        tokenizer = tiny_tokenizer()
        pack_corpus([str(tmp_path / "a.txt")], tokenizer, seq_len=16, row_mode="packed", seed=0, note=notes.append)
        return notes

    assert notes_of("babo " * 99 + "zz\n") == []
    [note] = notes_of("babo debo zz\nbabo\n")
    assert note.startswith("25.0% of the corpus's tokens are unknown to the tokenizer ([UNK])")
    with pytest.raises(CorpusError, match=r"knows nothing of the corpus: all its 3 tokens are '\[UNK\]'"):
        notes_of("zz zz\nzz\n")


def test_a_token_without_an_embedding_is_refused_where_it_occurs(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer, text = causal_tokenizer("<bos> $A"), tmp_path / "text.txt"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"seq_len": 8, "row_mode": "packed", "seed": 0, "causal": True, "vocab_size": 1024}
    text.write_text("the cat\nsat\n")
    assert len(pack_corpus([str(text)], tokenizer, **sizes)) > 0
    text.write_text("the cat\nsat <image>\n")
    with pytest.raises(CorpusError, match=r"the token '<image>' \(id 1024\).*end at 1023"):
        pack_corpus([str(text)], tokenizer, **sizes)


def test_the_end_of_a_text_is_not_unknown(causal_tokenizer, tmp_path: Path) -> None:
    tokenizer, text, notes = causal_tokenizer(), tmp_path / "pairs.jsonl", list[str]()
    tokenizer.unk_token = "<eos>"
    text.write_text('{"prompt": "the cat", "completion": " sat"}\n' * 20)
    pack_corpus([str(text)], tokenizer, seq_len=8, row_mode="packed", seed=0, causal=True, note=notes.append)
    assert notes and not any("unknown" in note for note in notes)


@pytest.mark.parametrize("mix_alpha", [None, 0.5])
def test_what_is_left_out_is_said(mix_alpha: float | None, tiny_tokenizer, tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "a.txt").write_text("babo\n")
    (tmp_path / "b.md").write_text("debo\n")
    rows = pack_corpus(
        [str(tmp_path)], tiny_tokenizer(), seq_len=16, row_mode="packed", seed=0, mix_alpha=mix_alpha, note=notes.append
    )
    assert rows.record.tokens == 1
    assert notes == [f"left out of {tmp_path}: 1 with other endings (b.md)"]
