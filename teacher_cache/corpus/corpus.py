"""Documents -> fixed-length rows of token ids, in the final shuffled order, with stable row numbers.

`packed` rows follow RoBERTa's "full sentences" (Liu et al. 2019, section 4.2): the token ids of all documents, joined
by one separator token, are cut into rows of `seq_len` positions, which include the special tokens that the tokenizer
puts around every sequence; the last row may be short and is padded. `document` rows hold the beginning of one document
each. In `isolated` rows no document sees another: each is a segment of its own, which has the tokenizer's special
tokens around it, and it is said where segments begin (`packing`). A causal model's rows end in text; its documents end
in the token that ends a text (`frame`).

Cost: one pass of the tokenizer over the text. Token ids stay in a temporary file (`TokenSpool`); memory holds 8 bytes
per document and 34 per row.

A row's id is its number in packing order, and rows are kept in ascending order of a hash of (seed, row id), or in an
order that mixes several sources (`mixing`): the first N rows are the same however many more are kept. A packed row
belongs to the source of the first document in it. Nothing here knows a model or masks anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.manifest import CorpusRecord, RowMode, sha256_of_json
from teacher_cache.corpus.columns import Note, no_note
from teacher_cache.corpus.documents import read_documents
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.mixing import Mix
from teacher_cache.corpus.packing import RowSpans, cut_at, cut_isolated
from teacher_cache.corpus.tokens import Ids, TokenSpool, tell_unknown, tokenise
from teacher_cache.errors import CorpusError, SettingsError
from teacher_cache.random_bits import uniform_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
Segments = Literal["joined", "isolated"]


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows: padded ids, real positions, stable row ids, and the first document in each row.

    `starts_BT` is True where a segment begins, as at position 0 of every row and at no padding; None of joined rows.
    `learnt_BT` is True at tokens that a model is to learn to say; None where that is all of them.
    """

    input_ids_BT: Ids
    length_B: NDArray[np.int32]
    row_id_B: NDArray[np.int64]
    document_B: NDArray[np.int64]
    starts_BT: NDArray[np.bool_] | None = None
    learnt_BT: NDArray[np.bool_] | None = None


class Rows:
    """The rows that are kept, in final order, read from the temporary file as they are asked for."""

    def __init__(
        self,
        *,
        record: CorpusRecord,
        frame: RowFrame,
        seq_len: int,
        tokens: Ids,
        spans: RowSpans,
        first_document: NDArray[np.int64],
        kept_rows: NDArray[np.int64],
        segment_starts: NDArray[np.int64] | None = None,
        first_row: int = 0,
        sources: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`segment_starts`, of isolated rows, says where among `tokens` segments begin, beside those of the rows.

        `first_row` says where in the final order the kept rows begin; `sources`, of a mix, how many rows of each are
        kept.
        """
        self.record = record
        self._frame, self._seq_len = frame, seq_len
        self._tokens, self._spans, self._first_document = tokens, spans, first_document
        self._kept_rows, self._segment_starts = kept_rows, segment_starts
        self.first_row = first_row
        self.sources = sources

    def part(self, number: int, parts: int) -> Rows:
        """The rows of part `number`, from 1, of `parts`: a contiguous share of the final order.

        Raises:
            SettingsError: there are fewer rows than parts.
        """
        start, stop = (len(self) * end // parts for end in (number - 1, number))
        if start == stop:
            raise SettingsError(
                f"--part {number}/{parts} holds no row: there are {len(self)} of them; give fewer parts"
            )
        return Rows(
            record=self.record,
            frame=self._frame,
            seq_len=self._seq_len,
            tokens=self._tokens,
            spans=self._spans,
            first_document=self._first_document,
            kept_rows=self._kept_rows[start:stop],
            segment_starts=self._segment_starts,
            first_row=self.first_row + start,
        )

    def __len__(self) -> int:
        return len(self._kept_rows)

    def read(self, start: int, stop: int) -> RowBlock:
        """Rows start..stop of the final order; T is `seq_len` for every row."""
        row_id_B = self._kept_rows[start:stop]
        frame, spans = self._frame, self._spans
        first_B, stop_B = spans.start_R[row_id_B], spans.stop_R[row_id_B]
        text_B = stop_B - first_B
        head_B = len(frame.prefix) * spans.prefixed_R[row_id_B]
        tail_B = len(frame.suffix) * spans.suffixed_R[row_id_B]
        input_ids_BT = np.full((len(row_id_B), self._seq_len), frame.padding, dtype=np.int32)
        offset_BT = np.arange(self._seq_len) - head_B[:, None]
        real_BT = (offset_BT >= 0) & (offset_BT < text_B[:, None])
        input_ids_BT[real_BT] = self._tokens[(first_B[:, None] + offset_BT)[real_BT]]
        input_ids_BT[head_B > 0, : len(frame.prefix)] = frame.prefix
        after_text_B = head_B + text_B
        for place, token in enumerate(frame.suffix):
            row_B = np.flatnonzero(tail_B)
            input_ids_BT[row_B, after_text_B[row_B] + place] = token
        return RowBlock(
            input_ids_BT=input_ids_BT,
            length_B=(after_text_B + tail_B).astype(np.int32),
            row_id_B=row_id_B,
            document_B=self._first_document[row_id_B],
            starts_BT=self._starts(first_B, stop_B, head_B),
        )

    def _starts(
        self, first_B: NDArray[np.int64], stop_B: NDArray[np.int64], head_B: NDArray[np.int64]
    ) -> NDArray[np.bool_] | None:
        if self._segment_starts is None:
            return None
        starts_BT = np.zeros((len(first_B), self._seq_len), dtype=bool)
        starts_BT[:, 0] = True
        low_B, high_B = (np.searchsorted(self._segment_starts, at_B) for at_B in (first_B + 1, stop_B))
        for row, (low, high) in enumerate(zip(low_B, high_B, strict=True)):
            starts_BT[row, self._segment_starts[low:high] - first_B[row] + head_B[row]] = True
        return starts_BT


def pack_corpus(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    row_mode: RowMode,
    seed: int,
    max_rows: int | None = None,
    mix_alpha: float | None = None,
    segments: Segments = "joined",
    causal: bool = False,
    progress: Progress | None = None,
    note: Note = no_note,
) -> Rows:
    """Read, tokenise and pack a corpus. `progress` is told documents and tokens so far, once per million characters.

    `causal` rows are for a model that guesses the next token. `note` is told, once each, what the user should know of
    how the corpus is read.

    Raises:
        CorpusError: the text cannot be read, or there is none, or none that the tokenizer knows.
        SettingsError: `seq_len` leaves no room for text, or shares of the sources are not clear.
        TeacherError: the tokenizer lacks a token that rows need.
        SpaceError: the disk of temporary files is full.
    """
    frame = RowFrame.of(tokenizer, causal=causal)
    text_positions = frame.text_positions(seq_len)
    if causal and seq_len < 2:
        raise SettingsError(
            f"--seq-len {seq_len!r} leaves no token a next one, which a causal model guesses; give more"
        )
    packed, isolated = row_mode == "packed", segments == "isolated"
    # documents that begin and end by themselves, or stand between special tokens of the row
    alone = isolated if packed else causal
    mix = Mix.of(specs, mix_alpha)
    sources = [read_documents([spec], note) for spec in mix.specs] if mix else [read_documents(specs, note)]
    with TokenSpool(
        separator=frame.separator if packed and not alone else None,
        prefix=frame.prefix if alone else (),
        ending=frame.ending if alone else (),
        limit=None if packed else text_positions,
        unknown_id=tokenizer.unk_token_id,
    ) as spool:
        first_documents, sizes = _read_sources(sources, tokenizer, spool, progress)
        ids, starts = spool.ids(), spool.starts()
    if not spool.documents:
        raise CorpusError(
            f"the corpus {' '.join(specs)!r} is empty, or has blank lines only: there is nothing to learn from; "
            "give a corpus with text"
        )
    tell_unknown(spool, tokenizer, note)
    if packed and alone:
        spans = cut_isolated(starts, len(ids), frame=frame, seq_len=seq_len, whole=None)
    else:
        spans = cut_at(np.arange(0, len(ids), text_positions) if packed else starts, len(ids), framed=not alone)
    first_document = np.searchsorted(starts, spans.start_R, side="right") - 1
    rows = len(spans)
    fingerprint, kept = spool.fingerprint(), list[tuple[str, int]]()
    if mix is None:
        order = np.argsort(uniform_bits(seed, np.arange(rows)), kind="stable")
    else:
        source_of_row = np.searchsorted(first_documents, first_document, side="right") - 1
        order, kept = mix.order_rows(seed, source_of_row, sizes, max_rows)
        fingerprint = sha256_of_json({"text": fingerprint, "sources": first_documents, **mix.identity()})
    if isolated:
        fingerprint = sha256_of_json({"text": fingerprint, "segments": segments})
    record = CorpusRecord(
        specs=tuple(specs), fingerprint=fingerprint, documents=spool.documents, tokens=spool.tokens, rows=rows
    )
    return Rows(
        record=record,
        frame=frame,
        seq_len=seq_len,
        tokens=ids,
        spans=spans,
        first_document=first_document.astype(np.int64),
        kept_rows=order[:max_rows].astype(np.int64),
        segment_starts=starts if isolated else None,
        sources=kept,
    )


def _read_sources(
    sources: Sequence[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    spool: TokenSpool,
    progress: Progress | None,
) -> tuple[list[int], list[int]]:
    """Tokenise every source into the spool; returns the number of each one's first document, and its tokens."""
    first_documents, sizes = list[int](), list[int]()
    for documents in sources:
        first_documents.append(spool.documents)
        before = spool.tokens
        for batch in tokenise(documents, tokenizer):
            spool.add(batch)
            if progress is not None:
                progress(spool.documents, spool.tokens)
        sizes.append(spool.tokens - before)
    return first_documents, sizes


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
