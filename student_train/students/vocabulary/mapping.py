"""Batches of a cache in the ids of a student that has fewer than the teacher.

Inputs that were dropped become the stand-in. Labels, and ids of cached distributions, become K, the first id that the
student has not got: losses know such ids from students whose vocabulary is padded to fewer entries than the teacher's
(`within_vocabulary`). So the mass of dropped ids joins that of all others where the most probable ids are kept, draws
of them are left out and the others' share is of the draws that remain, which is unbiased for the distribution
conditional on kept ids, and a place whose label was dropped has no loss of hard labels. Hidden states and attention
are the teacher's for the text as it was. Cost: one look-up per id.

Shapes: B rows, T positions, M places, V ids of the teacher, K kept ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from student_train.students.vocabulary.kept_ids import KeptIds
from teacher_cache.contract.batch import TargetBatch


class IdMapping:
    """Takes teacher's ids to those of a student, on any device."""

    def __init__(self, kept: KeptIds) -> None:
        self.kept = kept
        self._own_V: dict[torch.device, Tensor] = {}

    def batch(self, targets: TargetBatch) -> TargetBatch:
        """Rows and targets in the student's ids."""
        places, logits = targets.places, targets.logits
        if places is not None:
            places = replace(places, label_ids_BM=self._targets(places.label_ids_BM))
        if logits is not None:
            logits = replace(logits, ids_BMK=self._targets(logits.ids_BMK))
        return replace(targets, input_ids_BT=self.inputs(targets.input_ids_BT), places=places, logits=logits)

    def inputs(self, ids_BT: Tensor) -> Tensor:
        """The student's ids, the stand-in for those that it has not got."""
        own_BT = self._targets(ids_BT)
        return own_BT.masked_fill(own_BT == len(self.kept), self.kept.own_stand_in)

    def dropped(self, ids: Tensor) -> Tensor:
        """True at ids that the student has not got."""
        return self._targets(ids) == len(self.kept)

    def _targets(self, ids: Tensor) -> Tensor:
        if ids.device not in self._own_V:
            self._own_V[ids.device] = self.kept.own_V.to(ids.device)
        return self._own_V[ids.device][ids.long()].to(ids.dtype)
