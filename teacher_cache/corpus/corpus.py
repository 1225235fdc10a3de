"""Documents -> fixed-length rows of token ids, in the final shuffled order, with stable row numbers.

`packed` rows follow RoBERTa's "full sentences" (Liu et al. 2019, section 4.2): the token ids of all documents, joined
by one separator token, are cut into rows of `seq_len` positions, which include the special tokens that the tokenizer
puts around every sequence; the last row may be short and is padded. `document` rows hold the beginning of one document
each.

Cost: one pass of the tokenizer over the text. Token ids stay in a temporary file (`TokenSpool`); memory holds 8 bytes
per document and 24 per row.

A row's id is its number in packing order, and rows are kept in ascending order of a hash of (seed, row id), or in an
order that mixes several sources (`mixing`): the first N rows are the same however many more are kept. A packed row
belongs to the source of the first document in it. Nothing here knows a model or masks anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.manifest import CorpusRecord, RowMode, sha256_of_json
from teacher_cache.corpus.columns import Note, no_note
from teacher_cache.corpus.documents import read_documents
from teacher_cache.corpus.mixing import Mix
from teacher_cache.corpus.tokens import Ids, TokenSpool, encode, tell_unknown, tokenise
from teacher_cache.errors import CorpusError, SettingsError, TeacherError
from teacher_cache.random_bits import uniform_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
PROBE = "a"


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows: padded ids, real positions, stable row ids, and the first document in each row."""

    input_ids_BT: Ids
    length_B: NDArray[np.int32]
    row_id_B: NDArray[np.int64]
    document_B: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowFrame:
    """What stands around the text of every row, and what fills a short one."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int
    padding: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RowFrame:
        """Find the special tokens by encoding something: families differ, and the tokenizer alone knows.

        Raises:
            TeacherError: the tokenizer has no separator or no padding token.
        """
        plain = encode(tokenizer, [PROBE], special=False)[0]
        whole = encode(tokenizer, [PROBE], special=True)[0]
        starts = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
        if not starts:
            raise TeacherError(
                f"the tokenizer {tokenizer.name_or_path!r} reads {PROBE!r} as {plain} alone and as {whole} in a row: "
                "where text stands between special tokens cannot be told, so rows cannot be made; use the teacher's "
                "own tokenizer"
            )
        start = starts[0]
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        for name, token in (("separator (sep_token or eos_token)", separator), ("padding", tokenizer.pad_token_id)):
            if token is None:
                raise TeacherError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no {name} token: rows of text cannot be made "
                    "without it; set it in the teacher's tokenizer_config.json"
                )
        return cls(
            prefix=tuple(whole[:start]),
            suffix=tuple(whole[start + len(plain) :]),
            separator=cast(int, separator),
            padding=cast(int, tokenizer.pad_token_id),
        )

    def text_positions(self, seq_len: int) -> int:
        """Positions of a row that hold text.

        Raises:
            SettingsError: the special tokens alone fill the row.
        """
        around = len(self.prefix) + len(self.suffix)
        if seq_len <= around:
            raise SettingsError(
                f"--seq-len {seq_len!r} leaves no room for text: the tokenizer puts {around} special tokens around "
                f"each row; give at least {around + 1}, 128 is usual"
            )
        return seq_len - around


class Rows:
    """The rows that are kept, in final order, read from the temporary file as they are asked for."""

    def __init__(
        self,
        *,
        record: CorpusRecord,
        frame: RowFrame,
        seq_len: int,
        tokens: Ids,
        bounds: NDArray[np.int64],
        first_document: NDArray[np.int64],
        kept_rows: NDArray[np.int64],
        first_row: int = 0,
        sources: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`bounds` has one entry more than there are rows: row r holds tokens[bounds[r]:bounds[r + 1]].

        `first_row` says where in the final order the kept rows begin; `sources`, of a mix, how many rows of each are
        kept.
        """
        self.record = record
        self._frame, self._seq_len = frame, seq_len
        self._tokens, self._bounds, self._first_document = tokens, bounds, first_document
        self._kept_rows = kept_rows
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
            bounds=self._bounds,
            first_document=self._first_document,
            kept_rows=self._kept_rows[start:stop],
            first_row=self.first_row + start,
        )

    def __len__(self) -> int:
        return len(self._kept_rows)

    def read(self, start: int, stop: int) -> RowBlock:
        """Rows start..stop of the final order; T is `seq_len` for every row."""
        row_id_B = self._kept_rows[start:stop]
        frame, first_B = self._frame, self._bounds[row_id_B]
        text_B = self._bounds[row_id_B + 1] - first_B
        input_ids_BT = np.full((len(row_id_B), self._seq_len), frame.padding, dtype=np.int32)
        head, tail = len(frame.prefix), len(frame.suffix)
        input_ids_BT[:, :head] = frame.prefix
        offset = np.arange(self._seq_len - head - tail)
        real = offset < text_B[:, None]
        input_ids_BT[:, head : head + len(offset)][real] = self._tokens[(first_B[:, None] + offset)[real]]
        after_text = head + text_B[:, None] + np.arange(tail)
        np.put_along_axis(input_ids_BT, after_text, np.asarray(frame.suffix, dtype=np.int32)[None, :], axis=1)
        return RowBlock(
            input_ids_BT=input_ids_BT,
            length_B=(head + text_B + tail).astype(np.int32),
            row_id_B=row_id_B,
            document_B=self._first_document[row_id_B],
        )


def pack_corpus(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    row_mode: RowMode,
    seed: int,
    max_rows: int | None = None,
    mix_alpha: float | None = None,
    progress: Progress | None = None,
    note: Note = no_note,
) -> Rows:
    """Read, tokenise and pack a corpus. `progress` is told documents and tokens so far, once per million characters.

    `note` is told, once each, what the user should know of how the corpus is read.

    Raises:
        CorpusError: the text cannot be read, or there is none, or none that the tokenizer knows.
        SettingsError: `seq_len` leaves no room for text, or shares of the sources are not clear.
        TeacherError: the tokenizer lacks a token that rows need.
        SpaceError: the disk of temporary files is full.
    """
    frame = RowFrame.of(tokenizer)
    text_positions = frame.text_positions(seq_len)
    packed = row_mode == "packed"
    mix = Mix.of(specs, mix_alpha)
    sources = [read_documents([spec], note) for spec in mix.specs] if mix else [read_documents(specs, note)]
    with TokenSpool(
        separator=frame.separator if packed else None,
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
    bounds = np.append(np.arange(0, len(ids), text_positions) if packed else starts, len(ids))
    first_document = np.searchsorted(starts, bounds[:-1], side="right") - 1 if packed else np.arange(spool.documents)
    rows = len(bounds) - 1
    fingerprint, kept = spool.fingerprint(), list[tuple[str, int]]()
    if mix is None:
        order = np.argsort(uniform_bits(seed, np.arange(rows)), kind="stable")
    else:
        source_of_row = np.searchsorted(first_documents, first_document, side="right") - 1
        order, kept = mix.order_rows(seed, source_of_row, sizes, max_rows)
        fingerprint = sha256_of_json({"text": fingerprint, "sources": first_documents, **mix.identity()})
    record = CorpusRecord(
        specs=tuple(specs), fingerprint=fingerprint, documents=spool.documents, tokens=spool.tokens, rows=rows
    )
    return Rows(
        record=record,
        frame=frame,
        seq_len=seq_len,
        tokens=ids,
        bounds=bounds.astype(np.int64),
        first_document=first_document.astype(np.int64),
        kept_rows=order[:max_rows].astype(np.int64),
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
