"""Which teacher layer each student layer learns from.

In: a mapping's name, or pairs written out, and the depths of both models. Out: ordered (student layer, teacher layer)
pairs, numbered from 1. Pure numbers; where the layers' hidden states are stored is the cache's business. Formulas:
Udagawa et al., EMNLP 2023 Industry (arXiv 2310.08797), section 3, with k = teacher layers / student layers.
"""

from __future__ import annotations

from collections.abc import Callable

from teacher_cache.errors import SettingsError
from teacher_cache.layers import last_layers, uniform_layers

LayerPairs = tuple[tuple[int, int], ...]


def _only_last(teacher_layers: int, student_layers: int) -> LayerPairs:
    return ((student_layers, teacher_layers),)


def _one_each(formula: Callable[[int, int], tuple[int, ...]]) -> Callable[[int, int], LayerPairs]:
    return lambda teacher_layers, student_layers: tuple(enumerate(formula(teacher_layers, student_layers), start=1))


MAPPINGS: dict[str, Callable[[int, int], LayerPairs]] = {
    "last1": _only_last,
    "last": _one_each(last_layers),
    "uniform": _one_each(uniform_layers),
}
"""Name -> pairs of (teacher layers, student layers): `last1` {L_S -> L_T}, `last` phi(i) = L_T - L_S + i, `uniform`
phi(i) = floor(i k + 1/2)."""


def parse_mapping(text: str, teacher_layers: int, student_layers: int) -> LayerPairs:
    """Pairs of (student layer, teacher layer), by student layer and then by teacher layer, each pair once.

    Args:
        text: `last1`, `last`, `uniform`, a sum such as `uniform+last`, or explicit pairs `student:teacher` such as
            `1:4,2:8,3:12`; explicit pairs may stand in a sum too.
        teacher_layers: the teacher's depth.
        student_layers: the student's depth, at most the teacher's.

    Raises:
        SettingsError: the text cannot be read, names a layer that does not exist, or the student is the deeper model.
    """
    if student_layers > teacher_layers:
        raise SettingsError(
            f"--mapping {text!r}: the student has {student_layers} layers, the teacher {teacher_layers}, and a mapping "
            f"gives every student layer a teacher layer of its own: choose a student of at most {teacher_layers} layers"
        )
    pairs: set[tuple[int, int]] = set()
    for part in text.replace(" ", "").split("+"):
        if part in MAPPINGS:
            pairs.update(MAPPINGS[part](teacher_layers, student_layers))
        else:
            pairs.update(_read_pair(pair, text) for pair in part.split(","))
    for student_layer, teacher_layer in sorted(pairs):
        _check_layer("student", student_layer, student_layers, text)
        _check_layer("teacher", teacher_layer, teacher_layers, text)
    return tuple(sorted(pairs))


def _read_pair(pair: str, text: str) -> tuple[int, int]:
    student_layer, colon, teacher_layer = pair.partition(":")
    if not (colon and student_layer.isdecimal() and teacher_layer.isdecimal()):
        raise SettingsError(
            f"--mapping {text!r} cannot be read at {pair!r}: give one of {', '.join(MAPPINGS)}, a sum such as "
            "uniform+last, or pairs student:teacher such as 1:4,2:8,3:12"
        )
    return int(student_layer), int(teacher_layer)


def _check_layer(owner: str, layer: int, layers: int, text: str) -> None:
    if not 1 <= layer <= layers:
        raise SettingsError(
            f"--mapping {text!r} names layer {layer} of the {owner}, which has layers 1 to {layers}: there is no such "
            "hidden state to match; name layers that exist"
        )
