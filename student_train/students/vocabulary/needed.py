"""What a tokenizer cannot do without, so that it gives the same pieces as before on text whose pieces are kept.

In: the description of a tokenizer (`tokenizer.json` of the tokenizers library) and how often each id is used. Out: ids
that have to stay beside those. By the kind of its model:

- **WordPiece** takes the longest piece that it knows. A word whose pieces are kept finds the same ones, whatever else
  is gone. Pieces of one character stay, and pieces with a character that has none of its own: no word becomes unknown.
- **BPE** merges the pair of the lowest rank. The merges that make a kept piece from its characters stay, with every
  piece on the way; those that were applied to a text are then found in the same order, since what is gone was never
  applied. Pieces of one character (the byte alphabet) stay too, unless bytes stand in for characters.
- **Unigram** takes the segmentation of the highest score. One whose pieces are kept has no new rival: fewer pieces make
  fewer segmentations. Only an unknown character could be one, where its piece is gone; its score lies a fixed amount
  below that of the least probable piece, which is therefore kept. Where bytes do not stand in for characters, pieces
  of one character stay for the scripts that the text is in, so that a rare letter does not become unknown.
- **WordLevel** looks words up: what is gone becomes unknown.

Tokens that were added to a tokenizer, special ones among them, always stay. Cost: BPE of every kept piece, in Python,
about a second for 50,000.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import StudentError

Description = Mapping[str, Any]
"""The JSON object of a tokenizer."""
_SCRIPT_SHARE = 1e-3
"""A script is one of the text's if so many of its characters are of it; fewer are names and quotations."""
_SPACE = "▁"


def needed_ids(description: Description, counts_V: NDArray[np.int64], used: Iterable[int], name: str) -> set[int]:
    """The ids that have to stay where `used` ones do, these among them.

    Args:
        description: what the tokenizer is.
        counts_V: how often the text has each id, which says in which scripts it is.
        used: ids that are to stay.
        name: of the tokenizer, for messages.

    Raises:
        StudentError: its model is of a kind that cannot be cut.
    """
    model = description["model"]
    kind = model.get("type")
    if kind not in _BY_KIND:
        raise StudentError(
            f"the tokenizer of {name!r} has a model of the kind {kind!r}: which ids others need is known of "
            f"{', '.join(_BY_KIND)} alone, so its vocabulary cannot be cut; leave it whole"
        )
    tokens = piece_ids(model)
    kept = {token_id for token_id in used if token_id < len(counts_V)}
    kept |= {token["id"] for token in description["added_tokens"]}
    return kept | set(_BY_KIND[kind](_Uncut(model=model, tokens=tokens, kept=kept, counts_V=counts_V)))


@dataclass(frozen=True, kw_only=True)
class _Uncut:
    """A tokenizer's model, its pieces with their ids, the ids that stay already, and how often the text has each."""

    model: Mapping[str, Any]
    tokens: Mapping[str, int]
    kept: set[int]
    counts_V: NDArray[np.int64]

    @property
    def bytes_stand_in(self) -> bool:
        """Whether a character that is no piece is spelt in bytes."""
        return bool(self.model.get("byte_fallback")) and all(name in self.tokens for name in _BYTES)

    def named(self, pieces: Iterable[str | None]) -> Iterator[int]:
        """The ids of those that there are."""
        yield from (self.tokens[piece] for piece in pieces if piece is not None and piece in self.tokens)


def piece_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """The pieces of a tokenizer's model with their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {piece: token_id for token_id, (piece, _) in enumerate(vocabulary)}


def _of_wordpiece(uncut: _Uncut) -> Iterator[int]:
    model, tokens = uncut.model, uncut.tokens
    prefix = model["continuing_subword_prefix"]
    yield from uncut.named([model["unk_token"]])

    def alone(piece: str) -> bool:
        """Whether each of its characters is a piece where it stands."""
        inside = piece.startswith(prefix) and piece != prefix
        letters = piece[len(prefix) :] if inside else piece
        firsts = [prefix + letters[0]] if inside else [letters[0]]
        return all(one in tokens for one in (*firsts, *(prefix + letter for letter in letters[1:])))

    for piece, token_id in tokens.items():
        letters = piece.removeprefix(prefix)
        if len(letters) == 1 or (piece and not alone(piece)):
            yield token_id


def _of_bpe(uncut: _Uncut) -> Iterator[int]:
    model, tokens = uncut.model, uncut.tokens
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    yield from uncut.named([model.get("unk_token")])
    if uncut.bytes_stand_in:
        yield from uncut.named(_BYTES)
    else:
        yield from (
            token_id for piece, token_id in tokens.items() if len(piece.removeprefix(prefix).removesuffix(suffix)) == 1
        )
    ranks = {(first, second): rank for rank, (first, second) in enumerate(model["merges"])}
    for piece, token_id in tokens.items():
        if token_id in uncut.kept:
            yield from uncut.named(_on_the_way(piece, ranks, prefix, suffix))


def _on_the_way(piece: str, ranks: Mapping[tuple[str, str], int], prefix: str, suffix: str) -> set[str]:
    """The pieces that merging the characters of one goes through; none where that does not lead to it.

    Such a piece is found whole or not at all.
    """
    parts = _characters(piece, prefix, suffix)
    passed = set(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return set()
        merged = parts[place] + parts[place + 1].removeprefix(prefix)
        parts[place : place + 2] = [merged]
        passed.add(merged)
    return passed


def _characters(piece: str, prefix: str, suffix: str) -> list[str]:
    """What merging begins with: characters, marked where they go on a word or end it."""
    inside = bool(prefix) and piece.startswith(prefix) and piece != prefix
    letters = piece[len(prefix) :] if inside else piece
    ends = bool(suffix) and letters.endswith(suffix) and letters != suffix
    parts = list(letters.removesuffix(suffix) if ends else letters)
    parts = [part if place == 0 and not inside else prefix + part for place, part in enumerate(parts)]
    if ends:
        parts[-1] += suffix
    return parts


def _of_unigram(uncut: _Uncut) -> Iterator[int]:
    model, tokens = uncut.model, uncut.tokens
    scores = [score for _, score in model["vocab"]]
    yield int(np.argmin(scores))
    if model["unk_id"] is not None:
        yield model["unk_id"]
    if uncut.bytes_stand_in:
        yield from uncut.named(_BYTES)
        return
    scripts = _scripts(tokens, uncut.counts_V)
    for piece, token_id in tokens.items():
        letter = piece.removeprefix(_SPACE) or piece
        if len(letter) == 1 and (letter == _SPACE or letter.isascii() or _script(letter) in scripts):
            yield token_id


def _of_wordlevel(uncut: _Uncut) -> Iterator[int]:
    yield from uncut.named([uncut.model["unk_token"]])


_BY_KIND: Mapping[str, Callable[[_Uncut], Iterator[int]]] = {
    "WordPiece": _of_wordpiece,
    "BPE": _of_bpe,
    "Unigram": _of_unigram,
    "WordLevel": _of_wordlevel,
}


def _scripts(tokens: Mapping[str, int], counts_V: NDArray[np.int64]) -> set[str]:
    """The scripts that are no rarity among the characters of the text."""
    found: Counter[str] = Counter()
    for piece, token_id in tokens.items():
        count = int(counts_V[token_id]) if token_id < len(counts_V) else 0
        if count:
            for letter in piece:
                found[_script(letter)] += count
    return {script for script, count in found.items() if count >= _SCRIPT_SHARE * found.total()}


def _script(letter: str) -> str:
    """What the names of a script's characters begin with in Unicode, such as LATIN or CJK."""
    return unicodedata.name(letter, "").split(" ")[0]


_BYTES: Sequence[str] = tuple(f"<0x{byte:02X}>" for byte in range(256))
