"""First weights that rows decide: in the teacher's ids, whatever ids the student gets afterwards."""

from __future__ import annotations

from pathlib import Path

import torch

from student_train.settings import TrainSettings
from student_train.train.prepare import prepare_run


def test_a_sliced_student_is_the_same_before_it_is_cut(tiny_store: Path) -> None:
    """Fitting runs the teacher on rows of its own ids."""
    runs = [
        prepare_run(
            TrainSettings(
                method="hs", cache=(str(tiny_store),), student="2x16", steps=0, device="cpu", vocabulary=vocabulary
            )
        )
        for vocabulary in ("all", "coverage:0.8")
    ]
    kept = runs[1].vocabulary
    assert kept is not None
    whole, cut = (run.built.model.state_dict() for run in runs)
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        rows = weight[kept.kept.ids_K] if weight.shape != cut[name].shape else weight
        assert torch.equal(rows, cut[name]), name
    assert sum(whole[name].shape != cut[name].shape for name in whole) >= 1
