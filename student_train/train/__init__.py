"""`kdtrain`: prepare a run, take its steps, record them, keep the best student.

Begin with `train.py` (from settings to a student), then `prepare.py` (everything made and checked before the first
file is written) and `loop.py` (the steps). Around the loop: `feed.py` (the next batch), `validation.py`, `metrics.py`
and `weights_and_biases.py` (what is recorded), `best.py`, `signals.py`. Before it: `resume.py` (where to start),
`first_weights.py` and `vocabulary.py` (what rows decide of the
student), `describe.py` (what the run is, in words), `dry_run.py` (what it would take).
Doors: `train`, `dry_run`.
Knows all the wings below it; nothing of evaluation or of the command line. Trainings killed at any moment, and stores
that fail on the way, are in `test_train_faults.py` and `test_outages.py`.

`student_train.train` is what Python calls this wing, and what its users call the function in it. So the wing can be
called, and then trains: whichever is imported first, `from student_train import train` gives the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_train.settings import TrainSettings
    from student_train.train.train import TrainResult


class _CallableWing(ModuleType):
    def __call__(self, settings: TrainSettings) -> TrainResult:
        """Train a student as the settings say and export it; see `train` in `train.py`."""
        from student_train.train.train import train

        return train(settings)


sys.modules[__name__].__class__ = _CallableWing
