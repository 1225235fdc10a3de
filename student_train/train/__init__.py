"""`kdtrain`: prepare a run, take its steps, record them, keep the best student.

Begin with `train.py`, then `prepare.py` (what is made and checked before the first file is written) and `loop.py` (the
steps). Doors: `train`, `dry_run`.

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
