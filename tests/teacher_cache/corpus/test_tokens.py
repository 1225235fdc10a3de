"""The temporary file of token ids."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.corpus.tokens import CHARACTERS_AT_ONCE, TokenSpool, encode, tokenise, write
from teacher_cache.errors import SpaceError

DOCUMENTS = [[5, 6, 7], [8], [250_001, 9]]


def test_documents_lie_one_after_another() -> None:
    with TokenSpool() as spool:
        spool.add(DOCUMENTS[:1])
        spool.add(DOCUMENTS[1:])
        ids = spool.ids()
    assert ids.tolist() == [5, 6, 7, 8, 250_001, 9]  # still there after the file is closed
    assert spool.starts().tolist() == [0, 3, 4]
    assert (spool.documents, spool.tokens) == (3, 6)


def test_separator_stands_before_every_document_but_the_first() -> None:
    with TokenSpool(separator=1) as spool:
        spool.add(DOCUMENTS)
        ids = spool.ids()
    assert ids.tolist() == [5, 6, 7, 1, 8, 1, 250_001, 9]
    assert spool.starts().tolist() == [0, 3, 5]
    assert spool.tokens == 6


def test_limit_cuts_what_is_kept_not_what_is_counted() -> None:
    with TokenSpool(limit=2) as spool:
        spool.add(DOCUMENTS)
        ids = spool.ids()
    assert ids.tolist() == [5, 6, 8, 250_001, 9]
    assert spool.starts().tolist() == [0, 2, 3]
    assert spool.tokens == 6


def test_fingerprint_is_the_documented_one_whatever_is_kept() -> None:
    expected = hashlib.sha256(
        b"".join(struct.pack(f"<q{len(document)}i", len(document), *document) for document in DOCUMENTS)
    ).hexdigest()
    for kept in ({}, {"separator": 1}, {"limit": 1}):
        with TokenSpool(**kept) as spool:
            spool.add(DOCUMENTS)
        assert spool.fingerprint() == expected


def test_fingerprint_sees_where_documents_end() -> None:
    with TokenSpool() as one, TokenSpool() as other:
        one.add([[5, 6], [7]])
        other.add([[5], [6, 7]])
    assert one.fingerprint() != other.fingerprint()


def test_unknown_ids_are_counted() -> None:
    for kept in ({}, {"limit": 1}):
        with TokenSpool(unknown_id=7, **kept) as spool:
            spool.add([*DOCUMENTS, [7, 7]])
        assert (spool.unknown, spool.tokens) == (3, 8)


def test_nothing_is_no_document() -> None:
    with TokenSpool() as spool:
        assert len(spool.ids()) == len(spool.starts()) == 0


def test_full_disk_is_a_user_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a disk that is always full")
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(SpaceError, match="TMPDIR"):
        write(file, b"x" * 100)


def test_batches_are_bounded_and_change_nothing(tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    documents = ["babo debo", "zz " * (CHARACTERS_AT_ONCE // 2), *["bada"] * 5000, " \u200b "]
    documents = [*documents, "babo"]
    batches = list(tokenise(documents, tokenizer))
    assert len(batches) > 3
    flat = [list(ids) for batch in batches for ids in batch]
    assert flat == [ids for ids in encode(tokenizer, documents, special=False) if ids]


def test_prefix_and_ending_stand_around_documents_the_ending_of_whole_ones_alone() -> None:
    with TokenSpool(prefix=(1, 2), ending=(3,), limit=3) as spool:
        spool.add([[5, 6], [5, 6, 7], [5, 6, 7, 8]])
        ids = spool.ids()
    assert ids.tolist() == [1, 2, 5, 6, 3, 1, 2, 5, 6, 7, 1, 2, 5, 6, 7]
    assert spool.starts().tolist() == [0, 5, 10]
    assert (spool.documents, spool.tokens) == (3, 9)


def test_what_is_learnt_lies_beside_the_ids_once_it_is_not_all() -> None:
    flags = [np.array([False, True]), np.array([False, False, True, True])]
    chats = [(np.array([5, 6], dtype=np.int32), flags[0]), (np.array([5, 6, 7, 8], dtype=np.int32), flags[1])]
    with TokenSpool(prefix=(1,), ending=(3,), limit=2, separator=9) as spool:
        spool.add(DOCUMENTS[1:2])
        assert spool.learnt() is None
        spool.add_whole(chats)
        spool.add(DOCUMENTS[1:2])
        ids, learnt = spool.ids(), spool.learnt()
    assert ids.tolist() == [1, 8, 3, 9, 5, 6, 9, 5, 6, 7, 9, 1, 8, 3]  # a whole document has room for a prefix
    assert learnt is not None
    assert learnt.tolist() == [*[True] * 3, *[False, False, True], *[False, False, False, True], *[True] * 4]
    assert list(spool.whole) == [0, 1, 1, 0]
    assert (spool.documents, spool.tokens) == (4, 8)


def test_fingerprint_sees_what_is_learnt() -> None:
    seen = set()
    for flags in ([False, True], [True, True], None):
        with TokenSpool() as spool:
            if flags is None:
                spool.add([[5, 6]])
            else:
                spool.add_whole([(np.array([5, 6], dtype=np.int32), np.array(flags))])
            seen.add(spool.fingerprint())
    assert len(seen) == 3
