"""What is compared: one row of one view as it is stored, beside the same row as the teacher gives it now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from teacher_cache.contract.batch import TargetBatch
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.verify.deep.tolerance import TargetCheck


@dataclass(frozen=True, kw_only=True)
class DeepRow:
    """One row in one view: decoded, as the teacher gives it among others, as it gives it alone; all batches of one."""

    targets: TargetBatch
    masked_view: int
    plain_ids_BT: torch.Tensor
    """The row without masks."""
    live: TeacherOutputs
    alone: TeacherOutputs


class RowComparison(Protocol):
    """What is compared of each row."""

    def add(self, row: DeepRow) -> None:
        """Take one more row."""

    def results(self) -> list[TargetCheck]:
        """One line per thing compared."""


class InputComparison:
    """The masked row is the plain one with other ids at the masked positions, and says what stood there."""

    def __init__(self) -> None:
        self.wrong = 0

    def add(self, row: DeepRow) -> None:
        masked = row.targets.places
        assert masked is not None
        plain_T, seen_T = row.plain_ids_BT[0], row.targets.input_ids_BT[0]
        real_M = masked.real_BM()[0]
        positions_P, original_P = masked.positions_BM[0][real_M], masked.label_ids_BM[0][real_M]
        inside_P = (positions_P >= 0) & (positions_P < row.targets.length_B[0])
        changed_T = seen_T != plain_T
        changed_T[positions_P[inside_P]] = False
        self.wrong += int((~inside_P).sum()) + len(positions_P) - len(positions_P.unique()) + int(changed_T.sum())
        self.wrong += int((plain_T[positions_P[inside_P]] != original_P[inside_P]).sum())

    def results(self) -> list[TargetCheck]:
        problem = f"{self.wrong} positions do not fit the row" if self.wrong else ""
        return [
            TargetCheck(
                target="masked inputs",
                measure="wrong positions",
                stored=self.wrong,
                declared=0,
                noise=0,
                problem=problem,
            )
        ]
