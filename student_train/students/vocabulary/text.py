"""The ids of a text: how often it has each, which of them make up a share of it, and what a smaller vocabulary changes.

In: documents as strings. A part of them is in memory at a time. Cost: each pass tokenises the text once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.students.vocabulary.kept_ids import KeptIds

_CHARACTERS = 2**20
"""Of documents, how many are tokenised at a time; one that is longer is tokenised whole."""


def count_text(tokenizer: Any, documents: Iterable[str], entries: int) -> NDArray[np.int64]:
    """How often a text has each of `entries` ids [V], special ones that a tokenizer puts around a text left out."""
    counts_V = np.zeros(entries, dtype=np.int64)
    for texts in _batches(documents):
        for ids in _encode(tokenizer, texts).input_ids:
            found = np.bincount(np.asarray(ids, dtype=np.int64), minlength=entries)
            # an id that the model has no row for is none that could be kept
            counts_V += found[:entries]
    return counts_V


def covering(counts_V: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The fewest ids, most frequent first, that make up at least this share of all; of equal counts the lower id.

    A share of 1 takes every id that occurs.
    """
    order_V = np.argsort(-counts_V, kind="stable")
    reached_V = np.cumsum(counts_V[order_V])
    wanted = min(share * reached_V[-1], reached_V[-1]) if len(reached_V) else 0
    count = int(np.searchsorted(reached_V, wanted)) + 1
    return order_V[:count][counts_V[order_V[:count]] > 0]


@dataclass(frozen=True, kw_only=True)
class PieceDifferences:
    """What a smaller vocabulary changes about the pieces of a text.

    Of `pieces` before, `dropped` are those whose id is gone and `others` those that are kept, but do not stand where
    they stood. `unknown` is how many more pieces are the unknown one than before. `documents` of `all_documents` have
    a change.
    """

    pieces: int
    dropped: int
    others: int
    unknown: int
    documents: int
    all_documents: int

    @property
    def same(self) -> bool:
        """Whether nothing changes."""
        return self.documents == 0

    def to_json(self) -> dict[str, int]:
        """A JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        if self.same:
            return f"the same {self.pieces:,} pieces as before"
        return (
            f"of {self.pieces:,} pieces, {self.dropped:,} ({self.dropped / self.pieces:.2%}) are gone and are spelt by "
            f"others, {self.others:,} kept ones beside them have changed, {self.unknown:,} more are unknown; "
            f"{self.documents:,} of {self.all_documents:,} documents are concerned"
        )


def compare_pieces(before: Any, after: Any, kept: KeptIds, documents: Iterable[str]) -> PieceDifferences:
    """Compare the pieces of a text by a tokenizer and by the same one with the kept ids alone."""
    pieces = dropped = others = unknown = changed = total = 0
    ids_K = kept.ids_K.numpy()
    for texts in _batches(documents):
        for text, ids, new in zip(texts, *(_encode(each, texts).input_ids for each in (before, after)), strict=True):
            own = ids_K[np.asarray(new, dtype=np.int64)].tolist()
            total += 1
            pieces += len(ids)
            if ids == own:
                continue
            changed += 1
            places, own_places = (_encode(each, [text], offsets=True).offset_mapping[0] for each in (before, after))
            lost = Counter(zip(ids, places, strict=True)) - Counter(zip(own, own_places, strict=True))
            gone = sum(count for (token_id, _), count in lost.items() if kept.own(token_id) is None)
            dropped, others = dropped + gone, others + lost.total() - gone
            unknown += own.count(before.unk_token_id) - ids.count(before.unk_token_id)
    return PieceDifferences(
        pieces=pieces, dropped=dropped, others=others, unknown=unknown, documents=changed, all_documents=total
    )


def _encode(tokenizer: Any, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = list[str](), 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
