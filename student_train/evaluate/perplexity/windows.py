"""A document as windows of token ids, in which every token of the text is predicted exactly once.

With the document's tokens x_1 .. x_n and a token s that stands before them, the first window is s, x_1, .. of T tokens
and predicts all but its first. Every further one reaches S tokens further and predicts those alone, after at least
T - S tokens of context (one of them s, where `repeat` puts it before each window). Pure arithmetic on whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

_SORTED = 32


@dataclass(frozen=True)
class Window:
    """Token ids, of which the last `predicted` count."""

    ids: tuple[int, ...]
    predicted: int


def windows(
    ids: Sequence[int], start: int | None, *, seq_len: int, stride: int, repeat: bool = False
) -> Iterator[Window]:
    """The windows of one document.

    Args:
        ids: its tokens.
        start: the token that stands before the first one; without one the first is not predicted.
        seq_len: tokens of a window, 2 or more.
        stride: 1 to `seq_len` - 1.
        repeat: whether `start` stands before every window and not before the first alone; it takes the place of a
            token of context there.
    """
    whole = tuple(ids) if start is None else (start, *ids)
    done = 1
    while done < len(whole):
        end = min(seq_len if done == 1 else done + stride, len(whole))
        again = (start,) if repeat and start is not None and done > 1 else ()
        yield Window((*again, *whole[max(0, end - seq_len + len(again)) : end]), end - done)
        done = end


def batches(found: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """The windows, `size` at a time, of some hundred the longest first: what stands together has about one length."""
    waiting = iter(found)
    while some := list(islice(waiting, _SORTED * size)):
        some.sort(key=lambda window: -len(window.ids))
        yield from (some[place : place + size] for place in range(0, len(some), size))
