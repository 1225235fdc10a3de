"""Documents of every source, text and conversations -> token ids in the temporary file, in the order of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from teacher_cache.corpus.columns import Note
from teacher_cache.corpus.conversations import Chat
from teacher_cache.corpus.tokens import TokenSpool, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.corpus.chat import ChatEncoder
    from teacher_cache.corpus.frame import RowFrame

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Where reading of a source ends: once it has given so many documents, or documents of so many tokens together."""

    documents: int | None = None
    tokens: int | None = None

    def room(self, sizes: Iterable[int], documents: int, tokens: int) -> int:
        """How many documents of these sizes are still read after so many documents and tokens."""
        taken = 0
        for size in sizes:
            if self.is_full(documents, tokens):
                break
            documents, tokens, taken = documents + 1, tokens + size, taken + 1
        return taken

    def is_full(self, documents: int, tokens: int) -> bool:
        """Whether nothing more is read."""
        enough = self.documents is not None and documents >= self.documents
        return enough or (self.tokens is not None and tokens >= self.tokens)


EVERYTHING = Quota()


@dataclass(frozen=True, kw_only=True)
class SpooledSource:
    """A source that was read: the number of its first document, its tokens, and whether it was not read to its end."""

    first_document: int
    tokens: int
    cut: bool


def spool_sources(
    sources: Sequence[Iterable[str | Chat]],
    tokenizer: PreTrainedTokenizerBase,
    frame: RowFrame,
    spool: TokenSpool,
    *,
    quotas: Sequence[Quota],
    progress: Progress | None,
    note: Note,
) -> list[SpooledSource]:
    """Tokenise every source into the spool, each up to its quota.

    Raises:
        CorpusError: a source cannot be read or encoded, or no conversation of any has an answer.
        TeacherError: there are conversations, for which the tokenizer has no chat template.
        SpaceError: the disk of temporary files is full.
    """
    encoding = _Encoding(tokenizer, frame)
    found = []
    for documents, quota in zip(sources, quotas, strict=True):
        first, before, cut = spool.documents, spool.tokens, False
        for are_texts, batch in encoding.batches(documents):
            sizes = map(len, batch if are_texts else [ids for ids, _ in batch])
            room = quota.room(sizes, spool.documents - first, spool.tokens - before)
            (spool.add if are_texts else spool.add_whole)(batch[:room])
            if progress is not None:
                progress(spool.documents, spool.tokens)
            cut = quota.is_full(spool.documents - first, spool.tokens - before)
            if cut:
                break
        found.append(SpooledSource(first_document=first, tokens=spool.tokens - before, cut=cut))
    encoding.tell(note)
    return found


class _Encoding:
    """Text and conversations as token ids. Only conversations need templates: their encoder is made for the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frame: RowFrame) -> None:
        self._tokenizer = tokenizer
        self._frame = frame
        self._chats: ChatEncoder | None = None

    def batches(self, documents: Iterable[str | Chat]) -> Iterator[tuple[bool, Sequence[Any]]]:
        """Batches of documents of one kind, each with whether they are texts."""
        for are_texts, run in groupby(documents, key=lambda document: isinstance(document, str)):
            if are_texts:
                encoded: Iterator[Sequence[Any]] = tokenise(cast("Iterator[str]", run), self._tokenizer)
            else:
                encoded = self._encoder().encode(cast("Iterator[Chat]", run))
            for batch in encoded:
                yield are_texts, batch

    def tell(self, note: Note) -> None:
        """What there is to say of the conversations, if there were any."""
        if self._chats is not None:
            self._chats.tell(note)

    def _encoder(self) -> ChatEncoder:
        if self._chats is None:
            from teacher_cache.corpus.chat import ChatEncoder

            self._chats = ChatEncoder(self._tokenizer, self._frame)
        return self._chats
