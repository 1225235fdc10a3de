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
    encoder: ChatEncoder | None = None
    found = []
    for documents, quota in zip(sources, quotas, strict=True):
        first, before, cut = spool.documents, spool.tokens, False
        for are_texts, run in groupby(documents, key=lambda document: isinstance(document, str)):
            if not are_texts and encoder is None:
                # only conversations need templates
                from teacher_cache.corpus.chat import ChatEncoder

                encoder = ChatEncoder(tokenizer, frame)
            for batch in _encode(run, tokenizer, None if are_texts else encoder):
                sizes = map(len, batch if are_texts else [ids for ids, _ in batch])
                batch = batch[: quota.room(sizes, spool.documents - first, spool.tokens - before)]
                if are_texts:
                    spool.add(batch)
                else:
                    spool.add_whole(batch)
                if progress is not None:
                    progress(spool.documents, spool.tokens)
                cut = quota.is_full(spool.documents - first, spool.tokens - before)
                if cut:
                    break
            if cut:
                break
        found.append(SpooledSource(first_document=first, tokens=spool.tokens - before, cut=cut))
    if encoder is not None:
        encoder.tell(note)
    return found


def _encode(
    documents: Iterator[str | Chat], tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder | None
) -> Iterator[Sequence[Any]]:
    """A run of documents of one kind as token ids, batch by batch."""
    if encoder is None:
        return tokenise(cast("Iterator[str]", documents), tokenizer)
    return encoder.encode(cast("Iterator[Chat]", documents))
