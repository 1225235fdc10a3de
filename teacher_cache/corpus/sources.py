"""Documents of every source, text and conversations -> token ids in the temporary file, in the order of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, cast

from teacher_cache.corpus.columns import Note
from teacher_cache.corpus.conversations import Chat
from teacher_cache.corpus.tokens import TokenSpool, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.corpus.chat import ChatEncoder
    from teacher_cache.corpus.frame import RowFrame

Progress = Callable[[int, int], None]


def spool_sources(
    sources: Sequence[Iterable[str | Chat]],
    tokenizer: PreTrainedTokenizerBase,
    frame: RowFrame,
    spool: TokenSpool,
    *,
    progress: Progress | None,
    note: Note,
) -> tuple[list[int], list[int]]:
    """Tokenise every source into the spool; returns the number of each one's first document, and its tokens.

    Raises:
        CorpusError: a source cannot be read or encoded, or no conversation of any has an answer.
        TeacherError: there are conversations, for which the tokenizer has no chat template.
        SpaceError: the disk of temporary files is full.
    """
    encoder: ChatEncoder | None = None
    first_documents, sizes = list[int](), list[int]()
    for documents in sources:
        first_documents.append(spool.documents)
        before = spool.tokens
        for are_texts, run in groupby(documents, key=lambda document: isinstance(document, str)):
            if not are_texts and encoder is None:
                # only conversations need templates
                from teacher_cache.corpus.chat import ChatEncoder

                encoder = ChatEncoder(tokenizer, frame)
            for _ in _add(run, tokenizer, spool, None if are_texts else encoder):
                if progress is not None:
                    progress(spool.documents, spool.tokens)
        sizes.append(spool.tokens - before)
    if encoder is not None:
        encoder.tell(note)
    return first_documents, sizes


def _add(
    documents: Iterator[str | Chat], tokenizer: PreTrainedTokenizerBase, spool: TokenSpool, encoder: ChatEncoder | None
) -> Iterator[None]:
    """Add a run of documents of one kind, batch by batch."""
    if encoder is None:
        for texts in tokenise(cast("Iterator[str]", documents), tokenizer):
            spool.add(texts)
            yield
    else:
        for chats in encoder.encode(cast("Iterator[Chat]", documents)):
            spool.add_whole(chats)
            yield
