"""Text and tables in Markdown that show names of anybody's as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from teacher_cache.outside import visible

_HTML = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")
"""What begins a tag, a comment, a link or a character by name."""
_MARKDOWN = re.compile(r"`|\](?=[(\[:])|\\(?=[!-/:-@\[-`{-~])|\*|~(?=~)|(?<=~)~|_(?![^\W_])|(?<![^\W_])_")
"""What begins code, ends the words of a link, escapes what follows, emphasises or strikes out; `_` within a word does
not."""


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line: names of runs, tasks and settings are anybody's."""
    return _MARKDOWN.sub(lambda found: f"\\{found.group()}", _HTML.sub(_entity, visible(text)))


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]], *, words: int) -> str:
    """A table, of which so many of the first columns are words and the others numbers."""
    rule = [":--" if place < words else "--:" for place in range(len(columns))]
    return "\n".join(_line(cells) for cells in (columns, rule, *lines))


def code_lines(lines: Iterable[str], language: str) -> str:
    """Lines of code as they are, whatever is in them."""
    text = "\n".join(map(visible, lines))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _entity(found: re.Match[str]) -> str:
    return {"<": "&lt;", "&": "&amp;"}[found.group()]
