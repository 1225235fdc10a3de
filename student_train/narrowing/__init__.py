"""Narrower students that start from the teacher: its layers sliced to another width, fitted to what it computes.

`narrow` is the whole of it, see there; `describe.Narrowing` is what it says about itself.
"""

from student_train.narrowing.narrow import Narrowing, narrow
from student_train.narrowing.parts import ModelParts, find_parts
from student_train.narrowing.sample import TokenSample

__all__ = ["ModelParts", "Narrowing", "TokenSample", "find_parts", "narrow"]
