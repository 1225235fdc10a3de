"""What `--init` says: which weights a student starts from, and which teacher layer stands behind each of its own.

Text and numbers only, of the standard library; `students/initialise.py` does what the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from student_train.layer_map import MAPPINGS
from teacher_cache.contract.layers import last_layers, uniform_layers
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

_NAMED = ("auto", "random", "embeddings")
_MAPPED = {"uniform": uniform_layers, "last": last_layers}
"""The mappings that give every student layer one teacher layer."""
BY_IMPORTANCE = "importance"
"""Stands where a mapping does: the layers without which the cache's targets suffer most."""
_CHOICES = (*_MAPPED, BY_IMPORTANCE)
_EXAMPLES = (*_NAMED, *(f"teacher:{name}" for name in _CHOICES))


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """What `--init` asks for. `layers` or `mapping` name layers of the teacher, `folder` holds a whole model.

    Where `mapping` is `importance`, layers are chosen once there are rows to choose on.
    """

    text: str
    kind: Literal["auto", "random", "embeddings", "teacher", "folder"]
    layers: tuple[int, ...] = ()
    mapping: str = "uniform"
    folder: Path | None = None

    @property
    def insists(self) -> bool:
        """Whether a student that cannot take over what is named is refused, rather than given what fits."""
        return self.kind in ("embeddings", "teacher")

    @property
    def by_importance(self) -> bool:
        """Whether the rows of the cache choose the layers."""
        return self.mapping == BY_IMPORTANCE

    def of_decoder(self, student_layers: int, teacher_layers: int) -> InitPlan:
        """The same for a decoder whose cache can choose its layers: `auto` lets it, where some have to go."""
        chooses = self.kind == "auto" and student_layers < teacher_layers
        return replace(self, mapping=BY_IMPORTANCE) if chooses else self

    def check_student(self, student_layers: int) -> None:
        """Check what the student's depth alone decides.

        Raises:
            SettingsError: `teacher:LAYERS` names another number of layers than the student has.
        """
        if self.layers and len(self.layers) != student_layers:
            raise SettingsError(
                f"--init {self.text!r} names {len(self.layers)} teacher layers for a student of {student_layers}: "
                "every student layer needs one; name as many as the student has"
            )

    def layers_for(self, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
        """The teacher layer that stands behind each student layer; uniform ones until rows have chosen.

        Raises:
            SettingsError: as `check_student`, or a layer is named that the teacher does not have.
        """
        if not self.layers:
            return _MAPPED.get(self.mapping, uniform_layers)(teacher_layers, student_layers)
        beyond = [layer for layer in self.layers if layer > teacher_layers]
        if beyond:
            raise SettingsError(
                f"--init {self.text!r} names layer {beyond[0]}, the teacher has layers 1 to {teacher_layers}: there is "
                "nothing to copy; name layers that exist"
            )
        self.check_student(student_layers)
        return self.layers


def read_init(text: str, *, from_folder: Path | None) -> InitPlan:
    """Read `--init`; `from_folder` is the folder of a student that is not given by shape.

    Raises:
        SettingsError: the text cannot be read and names no folder, names a layer 0, or contradicts `--student FOLDER`.
    """
    folder = Path(text).expanduser()
    if text not in ("", *_NAMED) and folder.is_dir():
        return InitPlan(text=text, kind="folder", folder=folder)
    if from_folder is not None:
        if text != "auto":
            raise SettingsError(
                f"--init {text!r} with a student from folder {str(from_folder)!r}: the student has its own weights and "
                "would lose them; leave --init out, or give the student by shape such as --student 6x768"
            )
        return InitPlan(text=text, kind="folder", folder=from_folder)
    if text in _NAMED:
        return InitPlan(text=text, kind=text)  # type: ignore[arg-type]
    name, _, named = text.partition(":")
    if name == "teacher" and named in _CHOICES:
        return InitPlan(text=text, kind="teacher", mapping=named)
    if name == "teacher" and named in MAPPINGS:
        raise SettingsError(
            f"--init {text!r}: mapping {named} does not give every student layer one teacher layer of its own, so "
            f"there is no telling which to start from; give {' or '.join(f'teacher:{each}' for each in _CHOICES)}, or "
            "name the layers, such as teacher:2,4,6"
        )
    if name != "teacher" or not all(number.isdecimal() for number in named.split(",")):
        raise SettingsError(
            f"--init {text!r} cannot be read, and there is no such folder: {did_you_mean(text, _EXAMPLES)} auto, "
            "random, embeddings, teacher:LAYERS such as teacher:2,4,6, teacher:last or teacher:importance, or a "
            "Hugging Face folder"
        )
    layers = tuple(int(number) for number in named.split(","))
    if 0 in layers:
        raise SettingsError(
            f"--init {text!r} names layer 0: the teacher's layers are numbered from 1, and there is nothing to copy; "
            "name layers that exist"
        )
    return InitPlan(text=text, kind="teacher", layers=layers)
