"""Play back what a teacher gave for some rows, so that all formats under comparison store the same numbers.

    recording = RecordedTeacher(teacher, rows, layers=(2, 4), seq_len=256, folder=Path("scratch"))

The teacher reads every row once. Its hidden states go to one float32 file per layer, which is mapped into memory, so
that only the disk limits the size of the corpus. `run` finds rows by their token ids and answers as the teacher did,
with hidden states only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from teacher_cache.corpus.corpus import Rows
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.teacher import Teacher

_ROWS_AT_ONCE = 16


class RecordedTeacher:
    """Stands in for a `Teacher` that has read `rows`. `hidden` has float32 [rows, T, D] by layer."""

    def __init__(self, teacher: Teacher, rows: Rows, layers: Iterable[int], seq_len: int, folder: Path) -> None:
        self.device, self.record, self.tokenizer = torch.device("cpu"), teacher.record, teacher.tokenizer
        shape = (len(rows), seq_len, teacher.record.hidden_size)
        self.hidden = {layer: _map_file(folder / f"hidden-{layer}", shape) for layer in layers}
        self._place: dict[bytes, int] = {}
        for first in track(range(0, len(rows), _ROWS_AT_ONCE), "the teacher reads the rows"):
            part = rows.read(first, min(first + _ROWS_AT_ONCE, len(rows)))
            ids_BT = torch.from_numpy(part.input_ids_BT).long()
            outputs = teacher.run(
                ids_BT,
                torch.from_numpy(part.length_B),
                hidden_layers=tuple(self.hidden),
                starts_BT=None if part.starts_BT is None else torch.from_numpy(part.starts_BT),
            )
            for layer, values_BTD in outputs.hidden.items():
                self.hidden[layer][first : first + len(ids_BT)] = values_BTD.float().cpu()
            self._place |= {ids.numpy().tobytes(): first + row for row, ids in enumerate(ids_BT)}

    def run(self, input_ids_BT: torch.Tensor, length_B: torch.Tensor, **layers: Any) -> TeacherOutputs:
        """The recorded hidden states of these rows; without a copy where the rows follow one another."""
        places = [self._place[ids.numpy().tobytes()] for ids in input_ids_BT]
        following = places == list(range(places[0], places[0] + len(places)))
        which = slice(places[0], places[0] + len(places)) if following else places
        hidden = {layer: self.hidden[layer][which] for layer in layers["hidden_layers"]}
        return TeacherOutputs(hidden=hidden, attention={}, final_BTD=torch.empty(0))


def _map_file(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    size = shape[0] * shape[1] * shape[2]
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
