"""Where the linear maps of `hs` with given pairs and of `direct` start in a student without layers of the teacher.

In: the student in its wrapper and some of the rows to train on. Out: maps at the ridge regression from the student's
untrained vectors to the teacher's, so that a training begins no farther away than a constant guess. The identity, where
maps to a copied layer start, begins several times as far away in a random student: its hidden states have neither the
teacher's mean nor its scale. And a random map between different widths would make a student that was sliced from the
teacher leave what it has. `skip`, `emd` and `alp` are not fitted: they compare directions, or all layers at once.

Cost: forward passes over 8,192 positions in the views that the methods read, and products of these vectors in float64:
for twelve maps from 768 to 1,024 components some 2e11 operations and 260 MB.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from student_train.methods.base import MapsVectors
from student_train.methods.model import DistillationModel
from student_train.methods.projections import FloatLinear
from student_train.ridge import PairMoments, fit_ridge
from teacher_cache.contract.batch import Batch

FIT_TOKENS = 8_192
"""At most so many positions are read, padding among them (but two rows at least)."""
_BATCH_TOKENS = 2_048


def rows_to_fit(available: int, seq_len: int) -> tuple[int, int]:
    """How many rows to read, and how many at a time: two times at least, as what is fitted is tested on other rows."""
    rows = min(available, max(2, FIT_TOKENS // seq_len))
    return rows, max(1, min(_BATCH_TOKENS // seq_len, rows // 2))


@torch.no_grad()
def fit_maps(model: DistillationModel, batches: Iterable[Batch]) -> bool:
    """Let the maps of the objective's methods start at the ridge regression on these rows; False if none does.

    Batches by turns make two sets, between which the strength of the ridge is chosen, see `ridge.fit_ridge`. Maps are
    left where they are if one batch holds all rows, or if the student gives numbers that are not finite.
    """
    methods = {name: method for name, method in model.objective.methods.items() if isinstance(method, MapsVectors)}
    if not methods:
        return False
    moments: dict[tuple[str, str], list[PairMoments]] = {}
    training = model.training
    model.eval()
    for place, batch in enumerate(batches):
        outputs = model.run_student(batch)
        for name, method in methods.items():
            for of_map, student_ND, teacher_ND in method.mapped(outputs, batch):
                widths = student_ND.shape[1], teacher_ND.shape[1]
                sets = moments.setdefault((name, of_map), [PairMoments(*widths, student_ND.device) for _ in range(2)])
                sets[place % 2].add(student_ND, teacher_ND)
    model.train(training)
    fitted = [
        _fit(model.objective.projections[name].get_submodule(of_map), sets) for (name, of_map), sets in moments.items()
    ]
    return any(fitted)


def _fit(linear: nn.Module, sets: list[PairMoments]) -> bool:
    assert isinstance(linear, FloatLinear)
    if not all(one.count for one in sets):
        return False
    one, other = (each.statistics() for each in sets)
    # the validation before the first step says what is wrong with such a student
    if not all(torch.isfinite(each.covariance_xx).all() for each in (one, other)):
        return False
    found = fit_ridge(one, other)
    linear.start_at(found.weight_XY.T, found.bias_Y)
    return True
