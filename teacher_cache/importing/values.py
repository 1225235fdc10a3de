"""What the shapes of log-probabilities have in common: ids of a record, entries of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.importing.files import Record
from teacher_cache.importing.source import Distributions, refuse

ID_NAMES = ("input_ids", "prompt_token_ids")
"""What the token ids of a row are called."""


def unwrap(record: Record, where: str) -> Record:
    """What a server's answer holds of the one completion that is in it; any other record as it is."""
    choices = record.get("choices")
    if choices is None:
        return record
    if not isinstance(choices, Sequence) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        refuse(where, "'choices' is not a list of one completion: which one the row is of is not said; keep one")
    return {**record, **choices[0]}


def has_ids(record: Record) -> bool:
    """Whether a record gives its token ids."""
    return any(record.get(name) is not None for name in ID_NAMES)


def read_ids(record: Record, where: str) -> NDArray[np.int64]:
    """The token ids of a row.

    Raises:
        SourceError: there are none, or they are no whole numbers.
    """
    for name in ID_NAMES:
        if record.get(name) is not None:
            return whole_numbers(record[name], f"{where}: {name!r}")
    raise SourceError(f"{where}: there are no token ids; give them as {' or '.join(ID_NAMES)}")


def whole_numbers(values: Any, where: str) -> NDArray[np.int64]:
    """A list of whole numbers as an array."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        refuse(where, f"is a {type(values).__name__} where a list of ids should be")
    wrong = [value for value in values if type(value) is not int or not -(2**63) <= value < 2**63]
    if wrong:
        refuse(where, f"holds {wrong[0]!r:.60}, which is no id: give whole numbers")
    return np.array(values, dtype=np.int64)


def to_id(digits: str, where: str) -> int:
    """An id that is written in digits."""
    number = int(digits) if len(digits) < 19 else None
    if number is None:
        refuse(where, f"{digits:.60} is no token id: no vocabulary is so large; give ids of the teacher's")
    return number


def gather(entries: Sequence[tuple[int, int, Sequence[int], Sequence[float]]]) -> Distributions:
    """Distributions of (position, most probable ids in it, ids, log-probabilities), positions ascending."""
    return Distributions(
        position_P=np.array([entry[0] for entry in entries], dtype=np.int64),
        count_P=np.array([len(entry[2]) for entry in entries], dtype=np.int64),
        top_P=np.array([entry[1] for entry in entries], dtype=np.int64),
        ids_E=np.array(list(chain.from_iterable(entry[2] for entry in entries)), dtype=np.int64),
        log_probs_E=np.array(list(chain.from_iterable(entry[3] for entry in entries)), dtype=np.float64),
    )
