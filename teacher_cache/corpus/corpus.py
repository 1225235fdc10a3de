"""Documents -> fixed-length rows of token ids, in the final shuffled order, with stable row numbers.

`packed` rows follow RoBERTa's "full sentences" (Liu et al. 2019, section 4.2): the token ids of all documents, joined
by one separator token, are cut into rows of `seq_len` positions, which include the special tokens that the tokenizer
puts around every sequence; the last row may be short and is padded. `document` rows hold the beginning of one document
each. In `isolated` rows no document sees another: each is a segment of its own, which has the tokenizer's special
tokens around it, and it is said where segments begin (`packing`). A causal model's rows end in text; its documents end
in the token that ends a text (`frame`). Conversations are documents too (`chat`).

Cost: one pass of the tokenizer over the text, or over as much of it as is to be read. Token ids stay in a temporary
file (`TokenSpool`); memory holds 9 bytes per document and 34 per row.

A row's id is its number in packing order, and rows are kept in ascending order of a hash of (seed, row id), or in an
order that mixes several sources (`mixing`): of the same text, the first N rows are the same however many more are kept
(with a `shuffle_buffer` the rows asked for decide how much text there is). A packed row
belongs to the source of the first document in it. Nothing here knows a model or masks anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.manifest import CorpusRecord, RowMode, Segments, sha256_of_json
from teacher_cache.corpus.columns import Note, no_note
from teacher_cache.corpus.documents import read_documents
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.mixing import Mix
from teacher_cache.corpus.next_tokens import next_token_places
from teacher_cache.corpus.packing import cut_at, cut_isolated
from teacher_cache.corpus.rows import RowBlock, Rows
from teacher_cache.corpus.sources import EVERYTHING, Progress, Quota, SpooledSource, spool_sources
from teacher_cache.corpus.tokens import TokenSpool, refuse_without_embedding, tell_unknown
from teacher_cache.errors import CorpusError, SettingsError
from teacher_cache.random_bits import uniform_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Progress", "RowBlock", "Rows", "pack_corpus", "tokenizer_fingerprint"]

_ROWS_AT_ONCE = 256


def pack_corpus(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    row_mode: RowMode,
    seed: int,
    max_rows: int | None = None,
    mix_alpha: float | None = None,
    shuffle_buffer: int | None = None,
    segments: Segments = "joined",
    causal: bool = False,
    chat: bool | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    note: Note = no_note,
) -> Rows:
    """Read, tokenise and pack a corpus. `progress` is told documents and tokens so far, once per million characters.

    With a `shuffle_buffer`, no more of the corpus is read than `max_rows` and so many further rows take, of each source
    its share of them, and rows are drawn from these; datasets of the hub are streamed.

    `causal` rows are for a model that guesses the next token. Such a model learns the answers of conversations:
    `chat` says whether they are read where there are some (None), must be there (True), or are not read (False). `note`
    is told, once each, what the user should know of how the corpus is read. Ids from `vocab_size` on are refused.

    Raises:
        CorpusError: the text cannot be read, or there is none, or none that the tokenizer knows, or nothing to learn.
        SettingsError: `seq_len` leaves no room for text, shares of the sources are not clear, or an encoder is to learn
            answers.
        TeacherError: the tokenizer lacks a token that rows need, or the template that conversations need.
        SpaceError: the disk of temporary files is full.
    """
    frame = RowFrame.of(tokenizer, causal=causal)
    text_positions = frame.text_positions(seq_len)
    _refuse_nothing_to_learn(seq_len, causal=causal, chat=chat)
    packed, isolated = row_mode == "packed", segments == "isolated"
    # documents that begin and end by themselves, or stand between special tokens of the row
    alone = isolated if packed else causal
    mix = Mix.of(specs, mix_alpha)
    together = [(spec,) for spec in mix.specs] if mix else [specs]
    quotas = _quotas(specs, mix, max_rows, shuffle_buffer, text_positions if packed else None)
    streamed = shuffle_buffer is not None
    sources = [read_documents(some, note, chat=chat if causal else False, streamed=streamed) for some in together]
    with TokenSpool(
        separator=frame.separator if packed and not alone else None,
        prefix=frame.prefix if alone else (),
        ending=frame.ending if alone else (),
        limit=None if packed else text_positions,
        unknown_id=_unknown_id(tokenizer, frame),
    ) as spool:
        read = spool_sources(sources, tokenizer, frame, spool, quotas=quotas, progress=progress, note=note)
        ids, starts, learnt = spool.ids(), spool.starts(), spool.learnt()
    if not spool.documents:
        raise CorpusError(
            f"the corpus {' '.join(specs)!r} is empty, or has blank lines only: there is nothing to learn from; "
            "give a corpus with text"
        )
    if vocab_size is not None:
        refuse_without_embedding(spool, tokenizer, vocab_size)
    tell_unknown(spool, tokenizer, note)
    if packed and alone:
        spans = cut_isolated(starts, len(ids), frame=frame, seq_len=seq_len, whole=spool.whole)
    else:
        spans = cut_at(np.arange(0, len(ids), text_positions) if packed else starts, len(ids), framed=not alone)
    first_document_R = (np.searchsorted(starts, spans.start_R, side="right") - 1).astype(np.int64)
    enough = max_rows is not None and len(spans) >= max_rows
    _tell_cut(read, mix.specs if mix else [" ".join(specs)], spool.documents, enough=enough, note=note)
    order_R, shares, fingerprint = _ordered(mix, read, first_document_R, spool.fingerprint(), seed, max_rows)
    if isolated:
        fingerprint = sha256_of_json({"text": fingerprint, "segments": segments})
    rows = Rows(
        record=CorpusRecord(
            specs=tuple(specs),
            fingerprint=fingerprint,
            documents=spool.documents,
            tokens=spool.tokens,
            rows=len(spans),
            shuffle_buffer=shuffle_buffer,
        ),
        frame=frame,
        seq_len=seq_len,
        tokens=ids,
        spans=spans,
        first_document=first_document_R,
        kept_rows=order_R[:max_rows].astype(np.int64),
        segment_starts=starts if isolated else None,
        learnt=learnt,
        sources=shares,
    )
    if learnt is not None:
        _tell_silent(rows, note)
    return rows


def _unknown_id(tokenizer: PreTrainedTokenizerBase, frame: RowFrame) -> int | None:
    """The id that stands for what a tokenizer does not know; None where it ends or begins texts as well (GPT-2)."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (*frame.prefix, *frame.ending, frame.separator) else unknown


def _refuse_nothing_to_learn(seq_len: int, *, causal: bool, chat: bool | None) -> None:
    if causal and seq_len < 2:
        raise SettingsError(
            f"--seq-len {seq_len!r} leaves no token a next one, which a causal model guesses; give more"
        )
    if chat and not causal:
        raise SettingsError(
            "--chat asks for conversations, whose answers a causal model learns; this teacher is an encoder, which "
            "learns masked tokens of any text: leave out --chat and give text"
        )


def _ordered(
    mix: Mix | None,
    read: Sequence[SpooledSource],
    first_document_R: NDArray[np.int64],
    fingerprint: str,
    seed: int,
    max_rows: int | None,
) -> tuple[NDArray[np.integer[Any]], list[tuple[str, int]], str]:
    """The order in which rows are kept, how many of each source that makes, and the text's fingerprint with the mix."""
    if mix is None:
        order_R = np.argsort(uniform_bits(seed, np.arange(len(first_document_R))), kind="stable")
        return order_R, [], fingerprint
    first_documents = [source.first_document for source in read]
    source_R = np.searchsorted(first_documents, first_document_R, side="right") - 1
    order_R, kept = mix.order_rows(seed, source_R, [source.tokens for source in read], max_rows)
    return order_R, kept, sha256_of_json({"text": fingerprint, "sources": first_documents, **mix.identity()})


def refuse_unknown_shares(specs: Sequence[str], mix: Mix | None, shuffle_buffer: int | None) -> None:
    """Refuse to read only the beginning of several corpora where it is not said how much of each.

    Raises:
        SettingsError: it is not.
    """
    if shuffle_buffer is None:
        return
    if mix is not None and mix.weights is None:
        raise SettingsError(
            f"--mix-alpha {mix.alpha!r} needs the size of every corpus, and --shuffle-buffer {shuffle_buffer!r} reads "
            "only the beginning of each: give the shares yourself, such as --corpus a.txt@3 b.txt@1"
        )
    if mix is None and len(specs) > 1:
        raise SettingsError(
            f"--shuffle-buffer {shuffle_buffer!r} reads the beginning of a corpus, and of {len(specs)} one after "
            f"another that may be {specs[0]!r} alone: say how much of each to take, such as --corpus a.txt@3 b.txt@1"
        )


def _quotas(
    specs: Sequence[str], mix: Mix | None, max_rows: int | None, shuffle_buffer: int | None, positions: int | None
) -> list[Quota]:
    """How much of each source is read; a document is a row where `positions` of text in a row are not given."""
    refuse_unknown_shares(specs, mix, shuffle_buffer)
    sources = 1 if mix is None else len(mix.specs)
    if shuffle_buffer is None:
        return [EVERYTHING] * sources
    if max_rows is None:
        raise SettingsError(f"--shuffle-buffer {shuffle_buffer!r} is added to --max-rows, which is not given: give it")
    shares = [1.0] if mix is None else mix.shares([1] * sources).tolist()
    each = [math.ceil((max_rows + shuffle_buffer) * share) for share in shares]
    return [Quota(documents=rows) if positions is None else Quota(tokens=rows * positions) for rows in each]


def _tell_cut(read: Sequence[SpooledSource], specs: Sequence[str], documents: int, *, enough: bool, note: Note) -> None:
    """Say where reading ended, and where that left too few rows, which sources ended before it."""
    if not any(source.cut for source in read):
        return
    note(f"read {documents:,} documents, up to --shuffle-buffer: what may follow in the corpus is left out")
    short = [spec for spec, source in zip(specs, read, strict=True) if not source.cut]
    if short and not enough:
        note(
            f"{', '.join(short)} ended before its share of the rows, and what was read of the others does not make up "
            "for it: give other weights, or a larger --shuffle-buffer"
        )


def _tell_silent(rows: Rows, note: Note) -> None:
    """Say how many of the kept rows hold nothing that is to be learnt."""
    blocks = (rows.read(start, start + _ROWS_AT_ONCE) for start in range(0, len(rows), _ROWS_AT_ONCE))
    silent = sum(int((~next_token_places(block, positions="all", seed=0).any(axis=1)).sum()) for block in blocks)
    if silent == len(rows):
        raise CorpusError(
            f"none of the {silent} rows holds a token that is to be learnt: answers lie elsewhere in the corpus; keep "
            "more rows"
        )
    if silent:
        note(f"{silent} of {len(rows)} rows hold no token that is to be learnt, only what answers are given to")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of all that decides which ids a text gets: vocabulary, special ids and the rules of tokenizer.json.

    Padding and truncation are left out: they are settings of the last call, not of the tokenizer.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    special = {
        name: tokenizer.convert_tokens_to_ids(str(token)) for name, token in tokenizer.special_tokens_map.items()
    }
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    return sha256_of_json({"vocabulary": tokenizer.get_vocab(), "special": special, "rules": rules})
