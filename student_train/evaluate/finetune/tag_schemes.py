"""How tags spell entities: which scheme examples are in, and the entities of tags in it.

A scheme is known from the letters before the types of all examples together. IOB and IOE (Tjong Kim Sang and Veenstra
1999), with one letter for the first or the last word of an entity, are read as CoNLL's own script reads them, which
takes IOB1 as IOB2, and IOE1 as IOE2. IOBES, BMES (M stands for the words inside) and BILOU mark both ends, and
predictions in them count where they are whole: seqeval's mode "strict". Labels that a scheme cannot read are refused,
as entities would go missing without a word. Costs one pass over the tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from teacher_cache.errors import TaskError

PREFIXES: Mapping[str, frozenset[str]] = {
    "IOB": frozenset("BI"),
    "IOE": frozenset("IE"),
    "IOBES": frozenset("BIES"),
    "BMES": frozenset("BMES"),
    "BILOU": frozenset("BILU"),
}
"""The letters of each scheme beside O; the first scheme that has all letters of the examples is theirs."""
_STRICT = {"IOBES": "IOBES", "BMES": "IOBES", "BILOU": "BILOU"}
"""Those in which both ends of an entity are marked, and seqeval's name for them."""
_FIRST, _LAST = frozenset("BSU"), frozenset("ESLU")


def find_scheme(tags: Iterable[str], origin: str) -> str:
    """The scheme of these tags, one of `PREFIXES`.

    Raises:
        TaskError: there is none with all of their letters.
    """
    used = {tag[0] for tag in tags if tag != "O"}
    for name, letters in PREFIXES.items():
        if used <= letters:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(letters))}" for name, letters in PREFIXES.items())
    raise TaskError(
        f"the tags of {origin} begin with {', '.join(map(repr, sorted(used)))}, which no scheme of tags has together "
        f"({known}): where an entity begins and ends cannot be told; give all files in one of these schemes"
    )


def check_tags(words: Sequence[str], tags: Sequence[str], scheme: str, origin: str) -> None:
    """Refuse a sentence whose tags leave an entity open, or go on with one that was not begun.

    Raises:
        TaskError: there is such a tag.
    """
    if scheme not in _STRICT:
        return
    for before, tag in zip(("O", *tags), (*tags, "O"), strict=True):
        open_before = before != "O" and before[0] not in _LAST
        goes_on = tag != "O" and tag[0] not in _FIRST
        if open_before != goes_on or (goes_on and before[1:] != tag[1:]):
            raise TaskError(
                f"{origin!r} holds {' '.join(words)[:80]!r}, tagged {' '.join(tags)[:80]!r}: {tag!r} cannot follow "
                f"{before!r} in {scheme}, which the letters of all tags are of ("
                f"{', '.join(sorted(PREFIXES[scheme]))}): the entity would go missing; mend the tags, or give all "
                "files in one scheme"
            )


def score_entities(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]], scheme: str
) -> dict[str, float]:
    """F1, precision and recall of whole entities."""
    from seqeval import scheme as schemes
    from seqeval.metrics import f1_score, precision_score, recall_score

    how: dict[str, Any] = {"zero_division": 0}
    if scheme in _STRICT:
        how.update(mode="strict", scheme=getattr(schemes, _STRICT[scheme]))
    pair = tuple([[_plain(tag) for tag in tags] for tags in each] for each in (labels, predictions))
    return {
        "f1": float(f1_score(*pair, **how)),
        "precision": float(precision_score(*pair, **how)),
        "recall": float(recall_score(*pair, **how)),
    }


def _plain(tag: str) -> str:
    """BMES in the letters of IOBES."""
    return f"I{tag[1:]}" if tag[0] == "M" else tag
