"""JSON and text that somebody else may have written: bounded when it is read, harmless when it is shown.

Names of corpora, students, tasks and labels end on terminals and in pages. What steers a terminal (escape sequences),
or lets text look like other text (marks that turn its direction), is written out instead, as Python writes it. Standard
library only.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

MOST_BYTES = 64 * 2**20
"""Far more than any record: a manifest has some kilobytes, a commit a few hundred bytes an array."""
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text in one line, with every character that is not shown but acts written out: `\x1b` for an escape."""
    return _STEERING.sub(lambda found: repr(found.group())[1:-1], text)


def visible_strings(value: Any) -> Any:
    """What JSON gives, with every text in it `visible`, keys too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [visible_strings(one) for one in value]
    if isinstance(value, dict):
        return {visible(name): visible_strings(one) for name, one in value.items()}
    return value


def parse_json(data: str | bytes, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value of a JSON text, as it is.

    Raises:
        ValueError: it is too long, nested too deeply, no JSON, has a number that JSON does not know (NaN, Infinity) or
            that is beyond all that a computer has, or a name twice in an object, of which the first would be lost.
    """
    if len(data) > most_bytes:
        raise ValueError(f"it has {len(data)} bytes, a record has {most_bytes} at most")
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_read_float, object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError("it is nested too deeply for a record") from None


def parse_record(data: str | bytes, *, most_bytes: int = MOST_BYTES) -> Any:
    """`parse_json` for what will be shown: every text in it `visible`.

    Raises:
        ValueError: see `parse_json`.
    """
    return visible_strings(parse_json(data, most_bytes=most_bytes))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it holds {text[:40]}, which is beyond all numbers")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it holds {twice[:40]!r} twice in one object")
    return found
