"""The commands that a model was made by, from its stores on: what built or derived them, what trained and trimmed it.

In: what `kdtrain` left with a student, and its folder. Out: command lines as they were typed, in order. What nobody
recorded is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from student_train.evaluate.schemas import read_object
from student_train.run_files import TRIMMED

_DERIVED = re.compile(r"(?P<command>.*?); .*? was made \S+ by: (?P<source>.*)", re.DOTALL)
"""What a derived store says of itself (`teacher_cache/derive/origins.py`)."""


def commands_behind(stores: Iterable[str | None], provenance: Mapping[str, Any], folder: Path) -> list[str]:
    """The commands from the stores to the model, each once.

    Args:
        stores: what each store says that it was made by.
        provenance: the record of the training, or nothing.
        folder: that of the model.

    Raises:
        StudentError: the record of a trimming cannot be read.
    """
    built = [part for command in stores if command for part in _of_store(command)]
    command = provenance.get("command")
    trained = [command] if isinstance(command, str) else []
    return list(dict.fromkeys([*built, *trained, *_trimmed(provenance, folder)]))


def store_commands(cache: Mapping[str, Any]) -> list[str]:
    """What the stores of a training say that they were made by, from what its provenance says of the cache."""
    return [each["command"] for each in cache.get("stores") or [cache] if each.get("command")]


def _of_store(command: str) -> list[str]:
    """The commands that made a store: of a derived one, what made its source first."""
    if (found := _DERIVED.fullmatch(command)) is None:
        return [command]
    return [*_of_store(found["source"]), found["command"]]


def _trimmed(provenance: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """What cut the vocabulary: a student's provenance says it, the record beside the weights that of any model."""
    vocabulary = provenance.get("vocabulary")
    records = [vocabulary.get("trimmed") if isinstance(vocabulary, dict) else None]
    if (folder / TRIMMED).exists():
        records.append(read_object(folder / TRIMMED))
    for record in records:
        if isinstance(record, dict) and isinstance(command := record.get("command"), str):
            yield command
