"""Where the learned linear maps of `hs` and `direct` start in a student that holds no layers of the teacher.

In: the student in its wrapper and batches of the rows to train on. Out: maps at the ridge regression from the student's
untrained vectors to the teacher's, so that a training begins at most as far away as the best constant guess. The
identity, where maps to a copied layer start, begins several times as far away in a random student: its hidden states
have the teacher's scale at best, and neither its mean nor its directions; a random map between different widths tells
a student that was sliced from the teacher to leave what it has. Cost: one forward pass over 8,192 positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from student_train.distillation_model import DistillationModel
from student_train.methods.base import StudentOutputs
from student_train.ridge import Moments, fit_ridge
from teacher_cache.batch import Batch
from teacher_cache.specs import View

FIT_TOKENS = 8_192
"""At most so many positions are read, padding among them (but two rows at least)."""
_BATCH_TOKENS = 2_048


@runtime_checkable
class MapsVectors(Protocol):
    """A method whose linear maps lead from vectors of the student to vectors of the teacher."""

    def mapped(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name of each map, what it takes and what it should give, at real positions: [N, D_S] and [N, D_T]."""


def rows_to_fit(available: int, seq_len: int) -> tuple[int, int]:
    """How many rows to read, and how many at a time: two times at least, as what is fitted is tested on other rows."""
    rows = min(available, max(2, FIT_TOKENS // seq_len))
    return rows, max(1, min(_BATCH_TOKENS // seq_len, rows // 2))


@torch.no_grad()
def fit_maps(model: DistillationModel, batches: Iterable[Batch]) -> bool:
    """Let all maps of the objective's methods start at the ridge regression on these rows; False if there are none.

    Batches by turns make two sets, between which the strength of the ridge is chosen, see `ridge.fit_ridge`. Maps are
    left where they are if one batch holds all rows.
    """
    methods = {name: method for name, method in model.objective.methods.items() if isinstance(method, MapsVectors)}
    if not methods:
        return False
    moments: dict[tuple[str, str], list[Moments]] = {}
    training = model.training
    model.eval()
    for place, batch in enumerate(batches):
        outputs = model.run_student(batch)
        for name, method in methods.items():
            for of_map, student_ND, teacher_ND in method.mapped(outputs, batch):
                widths = student_ND.shape[1], teacher_ND.shape[1]
                sets = moments.setdefault((name, of_map), [Moments(*widths, student_ND.device) for _ in range(2)])
                sets[place % 2].add(student_ND, teacher_ND)
    model.train(training)
    fitted = False
    for (name, of_map), sets in moments.items():
        if all(one.count for one in sets):
            _set_map(model.objective.projections[name].get_submodule(of_map), sets)
            fitted = True
    return fitted


def _set_map(linear: nn.Module, sets: list[Moments]) -> None:
    assert isinstance(linear, nn.Linear)
    found = fit_ridge(*(one.statistics() for one in sets))
    linear.weight.copy_(found.weight_XY.T)
    linear.bias.copy_(found.bias_Y)
