"""Reading the JSON that measurements leave: what is not as it should be is refused by the names of file and entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from teacher_cache.errors import StudentError
from teacher_cache.outside import parse_record

KindT = TypeVar("KindT")
_IN_WORDS: Mapping[type, str] = {int: "a whole number", str: "text", list: "a list", dict: "an object"}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        StudentError: it cannot be read, or is no object.
    """
    try:
        record = parse_record(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudentError(
            f"{str(path)!r} cannot be read as JSON ({error}): what it says is lost; restore the file, or delete it and "
            "measure again"
        ) from error
    if not isinstance(record, dict):
        raise foreign(path, f"it holds {record!r:.60} where an object is expected")
    return record


def get(record: Mapping[str, Any], name: str, kind: type[KindT], path: Path) -> KindT:
    """The entry `name` of a record, of that kind."""
    if name not in record:
        raise foreign(path, f"it has no entry {name!r}")
    return check(record[name], kind, path, name)


def check(value: object, kind: type[KindT], path: Path, name: str) -> KindT:
    """`value`, the entry `name`, which has to be of that kind."""
    # True is an int to Python alone
    if not isinstance(value, kind) or isinstance(value, bool):
        raise foreign(path, f"{name!r} holds {value!r:.60} where {_IN_WORDS[kind]} is expected")
    return value


def number(value: object, path: Path, name: str) -> float:
    """`value` as a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise foreign(path, f"{name!r} holds {value!r:.60} where a finite number is expected")
    return float(value)


def duration(value: object, path: Path, name: str) -> float:
    """`value` as a number above 0."""
    found = number(value, path, name)
    if found <= 0:
        raise foreign(path, f"{name!r} holds {value!r} where a time above 0 is expected")
    return found


def foreign(path: Path, reason: str) -> StudentError:
    """The error of a file that holds something else than it should."""
    return StudentError(
        f"{str(path)!r} is no record of ours that can be read: {reason}; restore the file, or delete it and measure "
        "again"
    )
