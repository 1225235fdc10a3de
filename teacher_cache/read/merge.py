"""Which stores may be read as one: the manifests of the parts -> the manifest of the whole, or a refusal.

Parts must have been made by the same teacher in the same way, whatever their text, so that a student can learn from all
of them at once; and no row may be in two of them, where it would count twice. Whether two rows are the same is known of
one text (by its fingerprint): parts of it must come from one shuffle and hold different stretches of that. Different
texts are taken at their word. Paths are for messages. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from teacher_cache.contract.manifest import CorpusRecord, Manifest, sha256_of_json
from teacher_cache.errors import StoreError
from teacher_cache.wording import or_nothing

NamedManifest = tuple[str, Manifest]
"""A store's path and its manifest."""
MAY_DIFFER = frozenset(
    {"corpus", "source files", "number of rows (--max-rows)", "first row (--part)", "--block-rows", "--seed"}
)
"""Entries of a store's identity that need not be the same in every part."""


def merge_parts(parts: Sequence[NamedManifest]) -> Manifest:
    """The first part's manifest with the rows of all and, of several texts, a record of all of them.

    Raises:
        StoreError: the parts do not match, or some rows are in two of them.
    """
    for other in parts[1:]:
        _check_match(parts[0], other)
    _check_rows(parts)
    manifests = [manifest for _, manifest in parts]
    return replace(manifests[0], rows=sum(manifest.rows for manifest in manifests), corpus=_merge_texts(manifests))


def _check_match(one: NamedManifest, other: NamedManifest) -> None:
    differences = [entry for entry in one[1].differences(other[1]) if entry[0] not in MAY_DIFFER]
    if differences:
        lines = "".join(
            f"\n  {name}: {or_nothing(mine)} and {or_nothing(theirs)}" for name, mine, theirs in differences
        )
        raise StoreError(
            f"{one[0]!r} and {other[0]!r} do not match:{lines}\nA student cannot learn from both at once; give stores "
            "that the same teacher and the same settings made"
        )


def _check_rows(parts: Sequence[NamedManifest]) -> None:
    def place(part: NamedManifest) -> tuple[str, int]:
        return part[1].corpus.fingerprint, part[1].first_row

    for _, group in groupby(sorted(parts, key=place), key=lambda part: part[1].corpus.fingerprint):
        for one, other in pairwise(group):
            _check_pair(one, other)


def _check_pair(one: NamedManifest, other: NamedManifest) -> None:
    """Two parts of one text, of which `other` does not start before `one`."""
    (path, mine), (other_path, theirs) = one, other
    mend = "leave one of them out, or build both with the same --seed and a --part each, such as 1/2 and 2/2"
    if mine.seed != theirs.seed:
        raise StoreError(
            f"{path!r} and {other_path!r} hold rows of the same text in the orders of --seed {mine.seed!r} and "
            f"{theirs.seed!r}: rows that are in both would count twice; {mend}"
        )
    shared = min(mine.first_row + mine.rows, theirs.first_row + theirs.rows) - theirs.first_row
    if shared > 0:
        raise StoreError(
            f"{path!r} and {other_path!r} both hold rows {theirs.first_row} to {theirs.first_row + shared - 1} of the "
            f"same text: they would count twice; {mend}"
        )


def _merge_texts(manifests: Sequence[Manifest]) -> CorpusRecord:
    texts = list({manifest.corpus.fingerprint: manifest.corpus for manifest in manifests}.values())
    if len(texts) == 1:
        return texts[0]
    return CorpusRecord(
        specs=tuple(spec for text in texts for spec in text.specs),
        fingerprint=sha256_of_json([text.fingerprint for text in texts]),
        documents=sum(text.documents for text in texts),
        tokens=sum(text.tokens for text in texts),
        rows=sum(text.rows for text in texts),
    )
