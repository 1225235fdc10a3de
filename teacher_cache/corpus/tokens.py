"""Documents -> token ids in one temporary file, whatever the corpus weighs.

The tokenizer gets about a million characters at a time, a longer document in pieces (`pieces`), and works on the
documents of such a batch in parallel. The ids go to an unnamed temporary file, 4 bytes each, which the operating system
removes when the process ends, however that ends; memory keeps 9 bytes per document, and all ids of one document at a
time. TMPDIR says where the file lies.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from teacher_cache.corpus.pieces import PIECE_CHARACTERS, cut
from teacher_cache.disk import NO_SPACE
from teacher_cache.errors import CorpusError, SpaceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]

CHARACTERS_AT_ONCE = 1 << 20
DOCUMENTS_AT_ONCE = 2048
_MUCH_UNKNOWN = 0.01
_ONES = 1 << 20
_CHAT = 1 << 63  # beside the length of a document of which only some ids are learnt


class TokenSpool:
    """The token ids of all documents, one after another, and a fingerprint of them.

    With a `separator`, that id is put before every document but the first; with a `limit`, only so many ids of each
    document are kept. `prefix` and `ending` are put around every document, the ending only where the whole document and
    it are within the limit. None of this changes the fingerprint, which covers every id of every document and where
    each ends. Ids that are `unknown_id` are counted. Use it as a context: leaving it closes the files, which live on
    for as long as what `ids` and `learnt` mapped.

    Documents of which only some ids are learnt (`add_whole`) get nothing around them. From the first of them on there
    is a second file, which holds a byte for each id in the first.
    """

    def __init__(
        self,
        *,
        separator: int | None = None,
        prefix: Sequence[int] = (),
        ending: Sequence[int] = (),
        limit: int | None = None,
        unknown_id: int | None = None,
    ) -> None:
        self.documents = 0
        self.tokens = 0
        self.whole = bytearray()
        """A 1 for each document of `add_whole`."""
        self.unknown = 0
        self.largest = -1
        """The largest id."""
        self._unknown_id = unknown_id
        self._between = np.asarray([] if separator is None else [separator], dtype="<i4")
        self._prefix, self._ending = (np.asarray(around, dtype="<i4") for around in (prefix, ending))
        self._limit = limit
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed on leaving the context
        self._learnt: BinaryIO | None = None
        self._starts = array("q")
        self._written = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._learnt is not None:
            self._learnt.close()

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Append documents, each its token ids, all of which are learnt.

        Raises:
            SpaceError: the disk is full.
        """
        before = self._written
        write(self._file, b"".join(map(self._take, documents)))
        if self._learnt is not None:
            write(self._learnt, bytes([1]) * (self._written - before))

    def add_whole(self, documents: Sequence[tuple[Ids, NDArray[np.bool_]]]) -> None:
        """Append documents that have all around them already: ids, and which of them are learnt.

        The fingerprint covers the latter as well. A separator before one is not learnt.

        Raises:
            SpaceError: the disk is full.
        """
        if self._learnt is None:
            self._learnt = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed on leaving the context
            for start in range(0, self._written, _ONES):
                write(self._learnt, bytes([1]) * min(_ONES, self._written - start))
        ids, flags = list[bytes](), list[bytes]()
        for document, learnt in documents:
            whole = np.asarray(document, dtype="<i4")
            self._digest.update((len(whole) | _CHAT).to_bytes(8, "little"))
            self._digest.update(whole.tobytes() + np.packbits(learnt).tobytes())
            between = self._between if self.documents else self._between[:0]
            limit = None if self._limit is None else self._limit + len(self._prefix)
            ids.append(np.concatenate((between, whole[:limit])).tobytes())
            flags.append(bytes(len(between)) + learnt[:limit].astype(np.uint8).tobytes())
            self._count(whole, len(flags[-1]), whole=True)
        write(self._file, b"".join(ids))
        write(self._learnt, b"".join(flags))

    def _take(self, document: Sequence[int]) -> bytes:
        ids = np.asarray(document, dtype="<i4")
        self._digest.update(len(ids).to_bytes(8, "little"))
        self._digest.update(ids.tobytes())
        whole = self._limit is None or len(ids) + len(self._ending) <= self._limit
        before = self._between if self.documents else self._between[:0]
        kept = np.concatenate((before, self._prefix, ids[: self._limit], self._ending if whole else self._ending[:0]))
        self._count(ids, len(kept), whole=False)
        return kept.tobytes()

    def _count(self, ids: Ids, kept: int, *, whole: bool) -> None:
        self._starts.append(self._written)
        self._written += kept
        self.whole.append(whole)
        self.documents += 1
        self.tokens += len(ids)
        if len(ids):
            self.largest = max(self.largest, int(ids.max()))
        if self._unknown_id is not None:
            self.unknown += int(np.count_nonzero(ids == self._unknown_id))

    def ids(self) -> Ids:
        """All ids, mapped from the file."""
        if not self._written:
            return np.empty(0, dtype=np.int32)
        return np.memmap(self._file, dtype="<i4", mode="r", shape=(self._written,))

    def learnt(self) -> NDArray[np.bool_] | None:
        """Which of `ids` are learnt, mapped from the file; None where all are."""
        if self._learnt is None or not self._written:
            return None
        return np.memmap(self._learnt, dtype=np.bool_, mode="r", shape=(self._written,))

    def starts(self) -> NDArray[np.int64]:
        """Where each document starts among `ids`, the separator before it included."""
        return np.array(self._starts, dtype=np.int64)

    def fingerprint(self) -> str:
        """Hex SHA-256 over every document's number of ids (8 bytes) and ids (4 bytes each), little-endian."""
        return self._digest.hexdigest()


def tokenise(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Sequence[int]]]:
    """The token ids of each document, without special tokens, in batches; documents without any are left out.

    Raises:
        CorpusError: a document is too long for a tokenizer that must have it whole.
    """
    for batch in _batches(documents):
        if len(batch[0]) > CHARACTERS_AT_ONCE:
            yield [ids for ids in map(partial(_encode_long, tokenizer), batch) if ids]
        else:
            yield [ids for ids in encode(tokenizer, batch, special=False) if ids]


def _encode_long(tokenizer: PreTrainedTokenizerBase, document: str) -> Sequence[int]:
    ids = array("i")
    pieces = cut(document, tokenizer)
    while some_pieces := list(islice(pieces, max(1, CHARACTERS_AT_ONCE // PIECE_CHARACTERS))):
        for piece in encode(tokenizer, some_pieces, special=False):
            ids.extend(piece)
    return ids


def refuse_without_embedding(spool: TokenSpool, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse text in which a token occurs that has no row in the teacher's embeddings.

    Raises:
        CorpusError: there is such a token.
    """
    if spool.largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(spool.largest)
        raise CorpusError(
            f"the corpus holds the token {token!r} (id {spool.largest}), which was added to the tokenizer, and the "
            f"embeddings of the teacher end at {vocab_size - 1}: it cannot be read; leave out the records that hold "
            f"the text {token!r}"
        )


def tell_unknown(spool: TokenSpool, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]) -> None:
    """Say it where the tokenizer does not know much of the text.

    Raises:
        CorpusError: it knows nothing of it.
    """
    if not spool.unknown:
        return
    if spool.unknown == spool.tokens:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path!r} knows nothing of the corpus: all its {spool.tokens} tokens "
            f"are {tokenizer.unk_token!r}, of which nothing can be learnt; give text in a language and script of the "
            "teacher"
        )
    if spool.unknown > _MUCH_UNKNOWN * spool.tokens:
        note(
            f"{spool.unknown / spool.tokens:.1%} of the corpus's tokens are unknown to the tokenizer "
            f"({tokenizer.unk_token}): nothing is learnt of them; is this text in a language and script of the teacher?"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, never cut, with or without the special tokens around it."""
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's positions is fine: rows are cut afterwards
    )
    return cast("list[list[int]]", encoded["input_ids"])


def write(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` through to the disk's cache, where a full disk shows at once.

    Raises:
        SpaceError: the disk is full.
    """
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise SpaceError(
            f"the disk of temporary files, {tempfile.gettempdir()!r}, is full: token ids need 4 bytes each while the "
            "corpus is packed; free some space or set TMPDIR to a folder on a larger disk"
        ) from error


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and (characters + len(document) > CHARACTERS_AT_ONCE or len(batch) == DOCUMENTS_AT_ONCE):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
    if batch:
        yield batch
