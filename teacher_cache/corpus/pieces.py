"""Long documents in pieces, cut where the token ids of the whole are those of the pieces, one after another.

A tokenizer needs some two hundred bytes of memory for each byte of a text, so it must not get a long document as a
whole. It first splits a text into words, and then each word into tokens by itself. A document is cut between two words,
and at every cut the text around it is tried: its words, and its token ids, must be those of its two halves. Where that
cannot be shown, because a tokenizer does not split first or a script has no spaces, the piece goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from teacher_cache.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 1 << 18
MOST_UNCUT = 1 << 24
"""Characters that are tokenised as a whole where no cut is safe: this takes some 3 GB."""
_AROUND = 1 << 10  # characters on either side of a cut that are tried: tokenizers look no farther than a word or two
_NEAR = 1 << 13
_TRIES = 16
_GAPS = (re.compile(r"(?<=\S)[ \n](?=\S)"), re.compile(r"(?<=[。！？，、；])(?=\S)"))


def cut(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The document in pieces of at most `PIECE_CHARACTERS` where it can be cut so.

    Raises:
        CorpusError: more than `MOST_UNCUT` characters would have to be tokenised as a whole.
    """
    start, stop = 0, PIECE_CHARACTERS
    while stop < len(document):
        place = _last_safe_place(document, stop - PIECE_CHARACTERS, stop, tokenizer)
        if place is not None and place > start:
            yield document[start:place]
            start = place
            stop = start
        stop += PIECE_CHARACTERS
        if stop - start > MOST_UNCUT:
            raise CorpusError(
                f"a document of {len(document)} characters, which begins {document[:40]!r}, would take many GB of "
                f"memory: from character {start} on there is no place where the tokenizer {tokenizer.name_or_path!r} "
                "certainly splits it; give it in lines or records of fewer characters"
            )
    yield document[start:]


def _last_safe_place(document: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.pre_tokenizer is None:
        return None
    for gap in _GAPS:
        for first in dict.fromkeys((max(start, stop - _NEAR), start)):
            places = [found.start() for found in gap.finditer(document, first, stop)]
            for place in islice(reversed(places), _TRIES):
                if _is_safe(document[max(0, place - _AROUND) : place], document[place : place + _AROUND], tokenizer):
                    return place
    return None


def _is_safe(before: str, after: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(
        read(before + after) == read(before) + read(after)
        for read in (
            lambda text: _words(text, tokenizer),
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        )
    )


def _words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = tokenizer.backend_tokenizer
    plain = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain)]
