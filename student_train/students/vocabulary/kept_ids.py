"""Which of a teacher's ids a student still has: the record, and its file in the student's folder.

The student's id n is the teacher's id `ids_K[n]`; ids ascend, so that what was before another stays before it. The
file is JSON, since serving software takes every safetensors file of a folder for weights. Cost: one number per kept id.

Shapes: V ids of the teacher, K kept ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teacher_cache.errors import StudentError
from teacher_cache.fields import Count, OpenFields, check_fields
from teacher_cache.outside import parse_record

KEPT_IDS = "kept_ids.json"
"""Of a student's directory, the file that says which of the teacher's ids its own are."""
_VERSION = 1


class _File(OpenFields):
    version: Count
    teacher_vocab_size: Count
    stand_in: Count
    kept_ids: list[Count]


@dataclass(frozen=True, kw_only=True)
class KeptIds:
    """The kept ids [K], ascending, of `teacher_entries`; `stand_in`, one of them, is read where another was.

    Teacher's numbers, all of them.
    """

    ids_K: Tensor
    teacher_entries: int
    stand_in: int

    @classmethod
    def of(cls, ids: Iterable[int], teacher_entries: int, stand_in: int) -> KeptIds:
        """From ids in any order; `stand_in` is kept with them."""
        found = sorted({*ids, stand_in})
        return cls(ids_K=torch.tensor(found), teacher_entries=teacher_entries, stand_in=stand_in)

    def __len__(self) -> int:
        return len(self.ids_K)

    @cached_property
    def own_V(self) -> Tensor:
        """The student's id of each of the teacher's; K, the first that the student has not got, for dropped ones."""
        own_V = torch.full((self.teacher_entries,), len(self))
        own_V[self.ids_K] = torch.arange(len(self))
        return own_V

    @property
    def own_stand_in(self) -> int:
        """The student's number of `stand_in`."""
        return int(self.own_V[self.stand_in])

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids and what stands in for others."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def own(self, teacher_id: Any) -> int | None:
        """The student's id of one of the teacher's; None where it has none, or what is given is no id."""
        if type(teacher_id) is not int or not 0 <= teacher_id < self.teacher_entries:
            return None
        found = int(self.own_V[teacher_id])
        return found if found < len(self) else None

    def of_kept(self, kept: KeptIds) -> KeptIds:
        """`kept` are some of the ids that these are numbers of: the same ones by the numbers of the first teacher."""
        return KeptIds.of(self.ids_K[kept.ids_K].tolist(), self.teacher_entries, int(self.ids_K[kept.stand_in]))

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "version": _VERSION,
            "teacher_vocab_size": self.teacher_entries,
            "stand_in": self.stand_in,
            "kept_ids": self.ids_K.tolist(),
        }

    def write(self, folder: Path) -> None:
        """Write the file into a folder that is being put together."""
        (folder / KEPT_IDS).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")


def read_kept_ids(place: Path) -> KeptIds | None:
    """The record in a student's folder, or in a file; None where the folder has none.

    Raises:
        StudentError: it cannot be read, or cannot be such a record.
    """
    file = place / KEPT_IDS if place.is_dir() else place
    if place.is_dir() and not file.exists():
        return None
    try:
        found = check_fields(_File, parse_record(file.read_bytes()))
        _check(found)
    except (OSError, ValueError) as error:
        raise StudentError(
            f"{str(file)!r} cannot be read as a record of kept ids ({error}): which words a student's ids are cannot "
            "be told; restore the file from where the student came from"
        ) from error
    return KeptIds(
        ids_K=torch.tensor(found.kept_ids), teacher_entries=found.teacher_vocab_size, stand_in=found.stand_in
    )


def _check(found: _File) -> None:
    ids = found.kept_ids
    if found.version != _VERSION:
        raise ValueError(f"version {found.version}, of which this software knows {_VERSION} alone")
    if not ids or ids[-1] >= found.teacher_vocab_size or any(low >= high for low, high in pairwise(ids)):
        raise ValueError(f"kept_ids are no ascending ids below {found.teacher_vocab_size}")
    if found.stand_in not in ids:
        raise ValueError(f"stand_in {found.stand_in} is no kept id")
