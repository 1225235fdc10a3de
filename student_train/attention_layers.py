"""Which layers `--attention-layer` names: one layer of the teacher, or pairs of layers. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from student_train.layer_map import LayerPairs, as_pair, check_numbering, check_student_layers, check_teacher_layers
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What `--attention-layer` says by itself: pairs (student layer, teacher layer), None being the student's last."""

    text: str
    pairs: tuple[tuple[int | None, int], ...]

    def check_student(self, student_layers: int) -> None:
        """Check what the student's depth alone decides.

        Raises:
            SettingsError: a pair names a layer that the student does not have.
        """
        named = (layer for layer, _ in self.pairs if layer is not None)
        check_student_layers(named, student_layers, f"--attention-layer {self.text!r}")

    def for_depths(self, teacher_layers: int, student_layers: int) -> LayerPairs:
        """The pairs for two models, ascending and each once.

        Raises:
            SettingsError: one names a layer that does not exist.
        """
        self.check_student(student_layers)
        check_teacher_layers((layer for _, layer in self.pairs), teacher_layers, f"--attention-layer {self.text!r}")
        return tuple(sorted({(student_layers if layer is None else layer, taught) for layer, taught in self.pairs}))


def read_attention_layers(text: str) -> AttentionPlan:
    """What `--attention-layer` says: a layer of the teacher such as `5`, or pairs `student:teacher` such as `2:4,3:5`.

    Raises:
        SettingsError: the text cannot be read, or names a layer 0.
    """
    given, written = f"--attention-layer {text!r}", text.replace(" ", "")
    if written.isdecimal():
        check_numbering([(None, int(written))], given)
        return AttentionPlan(text=text, pairs=((None, int(written)),))
    pairs = []
    for part in written.split(","):
        pair = as_pair(part)
        if pair is None:
            raise SettingsError(
                f"{given} cannot be read at {part!r}: give a layer of the teacher such as 5, which the student's last "
                "layer learns, or pairs student:teacher such as 2:4,3:5"
            )
        pairs.append(pair)
    check_numbering(pairs, given)
    return AttentionPlan(text=text, pairs=tuple(pairs))
