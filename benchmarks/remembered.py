"""What a teacher makes of a row, computed once for all who ask: final hidden states, in a file for each row.

Stores of several forms of one distribution, and trainings with the teacher in the loop, read the same rows again and
again. Which rows share a batch changes the last bits of a state: a store that is built from memory may differ from one
built without, in a draw that lay on an edge. For measures of quality alone: whatever is timed must not read from here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.teacher import Teacher


@contextmanager
def remembered_finals(folder: Path, seq_len: int) -> Iterator[None]:
    """Inside, any teacher that is asked for final states alone of rows of `seq_len` tokens reads each row once.

    Files [T, D] of float32 are named by a hash of all that they follow from and renamed when complete, so that several
    processes may share `folder` and any of them may be killed. Other questions go to the teacher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_teacher = Teacher.run

    def run(
        self: Teacher,
        input_ids_BT: torch.Tensor,
        length_B: torch.Tensor,
        *,
        starts_BT: torch.Tensor | None = None,
        **asked: Any,
    ) -> TeacherOutputs:
        if input_ids_BT.shape[1] != seq_len or any(asked.values()):
            return run_teacher(self, input_ids_BT, length_B, starts_BT=starts_BT, **asked)
        given = (input_ids_BT, length_B) if starts_BT is None else (input_ids_BT, length_B, starts_BT)
        paths = [folder / _name(self, *row) for row in zip(*given, strict=True)]
        missing = [row for row, path in enumerate(paths) if not path.exists()]
        if missing:
            starts = None if starts_BT is None else starts_BT[missing]
            computed = run_teacher(self, input_ids_BT[missing], length_B[missing], starts_BT=starts).final_BTD
            for row, final_TD in zip(missing, computed.float().cpu().numpy(), strict=True):
                _write(paths[row], final_TD)
        final_BTD = torch.from_numpy(np.stack([np.load(path) for path in paths]))
        final_BTD = final_BTD.to(self.device, getattr(torch, self.dtype))
        return TeacherOutputs(hidden={}, attention={}, final_BTD=final_BTD)

    Teacher.run = run  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Teacher.run = run_teacher  # type: ignore[method-assign]


def _name(teacher: Teacher, ids_T: torch.Tensor, length: torch.Tensor, starts_T: torch.Tensor | None = None) -> str:
    hashed = hashlib.sha256(f"{teacher.record.weights_sha256} {teacher.dtype} {int(length)}".encode())
    hashed.update(ids_T.long().cpu().numpy().tobytes())
    if starts_T is not None:
        hashed.update(starts_T.cpu().numpy().tobytes())
    return f"{hashed.hexdigest()}.npy"


def _write(path: Path, values: NDArray[np.float32]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)
