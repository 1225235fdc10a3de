"""Which teacher layers each student layer learns from, and in which form.

The text of `--mapping` becomes a `MappingPlan`, which needs no model. With the depths of both models that becomes a
`LayerMapping`, whose pairs (student layer i, teacher layer j) are numbered from 1. `--attention-layer`, whose pairs are
written in the same way, is read here too and becomes an `AttentionPlan`. Whether the cache holds a layer is not known
here. Standard library only, so that settings can check both texts when they are made.

With S student layers, T teacher layers and k = T / S, which need not be whole:

    name           teacher layers of student layer i           what is matched                                source
    last1          T, for i = S only                           every position                                 [U]
    last           T - S + i                                   every position                                 [U]
    uniform        floor(i k + 1/2)                            every position                                 [U]
    uniform-cons   floor((i - 1) k) + 1 ... floor(i k)         every position                                 [U]
    uniform+last   those of uniform and of last                every position                                 [U]
    1:4,2:8,3:12   as written                                  every position
    skip           floor(i k + 1/2), for i < S                 the first token, both sides of length 1        [P]
    emd            all, by the flow of a transport problem     every position                                 [E]
    alp            all, by attention over them                 every position, with the weighted mean         [A]

[U] Udagawa et al., EMNLP 2023 Industry (arXiv 2310.08797), section 3; uniform-cons is written so that every teacher
layer has one student layer for fractional k too. [P] PKD, Sun et al., EMNLP 2019 (arXiv 1908.09355), section 3.2.
[E] BERT-EMD, Li et al., EMNLP 2020 (arXiv 2010.06133), section 3. [A] ALP-KD, Passban et al., AAAI 2021
(arXiv 2012.14022), section 3. The losses are in `losses.hidden`, and what they leave open is settled there.

The mappings that match every position of given layers add up: `last1+uniform-cons`, `uniform+1:12`. Those that other
packages add (`register_mapping`) match every position too, and may stand in a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from student_train.registry import ADDED_MAPPINGS, Addition
from teacher_cache.contract.layers import last_layers, uniform_layers
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

LayerPairs = tuple[tuple[int, int], ...]
Form = Literal["pairs", "skip", "emd", "alp"]
WEIGHING_ALL: tuple[Form, ...] = ("emd", "alp")
"""The mappings that weigh all pairs of layers by themselves."""

_Formula = Callable[[int, int], LayerPairs]
MappingT = TypeVar("MappingT", bound=Callable[[int, int], Iterable[tuple[int, int]]])


@dataclass(frozen=True, kw_only=True)
class LayerMapping:
    """A mapping for two models of known depth.

    `form` says what is done with the pairs, which are sorted and each there once: `pairs` matches the hidden states of
    each, `skip` their first tokens; `emd` and `alp` weigh them while training, and have all pairs.
    """

    text: str
    form: Form
    pairs: LayerPairs

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student layers that learn, ascending."""
        return tuple(sorted({student_layer for student_layer, _ in self.pairs}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher layers that are read, ascending."""
        return tuple(sorted({teacher_layer for _, teacher_layer in self.pairs}))

    @property
    def weighs_all(self) -> bool:
        """Whether the mapping weighs all pairs by itself, so that none of them is chosen beforehand."""
        return self.form in WEIGHING_ALL


def _only_last(teacher_layers: int, student_layers: int) -> LayerPairs:
    return ((student_layers, teacher_layers),)


def _one_each(formula: Callable[[int, int], tuple[int, ...]]) -> _Formula:
    return lambda teacher_layers, student_layers: tuple(enumerate(formula(teacher_layers, student_layers), start=1))


def _consecutive(teacher_layers: int, student_layers: int) -> LayerPairs:
    # in integers: floor(i k) = i T div S, exact where floating point would round k
    return tuple(
        (i, j)
        for i in range(1, student_layers + 1)
        for j in range((i - 1) * teacher_layers // student_layers + 1, i * teacher_layers // student_layers + 1)
    )


def _all_but_last(teacher_layers: int, student_layers: int) -> LayerPairs:
    return _one_each(uniform_layers)(teacher_layers, student_layers)[:-1]


def _every_pair(teacher_layers: int, student_layers: int) -> LayerPairs:
    return tuple((i, j) for i in range(1, student_layers + 1) for j in range(1, teacher_layers + 1))


_SUMMANDS: dict[str, _Formula] = {
    "last1": _only_last,
    "last": _one_each(last_layers),
    "uniform": _one_each(uniform_layers),
    "uniform-cons": _consecutive,
}
_ALONE: dict[Form, _Formula] = {"skip": _all_but_last, "emd": _every_pair, "alp": _every_pair}
_FORMULAS: dict[str, _Formula] = _SUMMANDS | {str(form): formula for form, formula in _ALONE.items()}
_FOR_ANY_DEPTH = ("last1", *WEIGHING_ALL)

MAPPINGS: tuple[str, ...] = (*_SUMMANDS, "uniform+last", *_ALONE)
"""Every mapping that has a name of ours. Sums of the first four are mappings too."""


def register_mapping(name: str) -> Callable[[MappingT], MappingT]:
    """A decorator that makes a function `--mapping NAME` for `hs`, alone or in a sum such as `last1+NAME`.

    The function is given the depths of both models, teacher first, and gives the pairs (student layer, teacher layer)
    whose hidden states are matched at every position. Layers are numbered from 1; a layer may be in several pairs:

        @register_mapping("every-other")
        def every_other(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
            return [(i, min(2 * i, teacher_layers)) for i in range(1, student_layers + 1)]

    `student_train.registry` says how a command comes to know of it.

    Raises:
        SettingsError: there is a mapping of that name already, or it is no name.
    """

    def register(function: MappingT) -> MappingT:
        ADDED_MAPPINGS.add(Addition(name=name, make=function), MAPPINGS)
        return function

    return register


def added_mappings(text: str) -> tuple[str, ...]:
    """Those mappings in the text of a `--mapping` that other packages have added.

    Raises:
        SettingsError: one of them cannot be imported.
    """
    parts = text.replace(" ", "").split("+")
    return tuple(part for part in parts if ":" not in part and part not in MAPPINGS and ADDED_MAPPINGS.find(part))


@dataclass(frozen=True, kw_only=True)
class MappingPlan:
    """What `--mapping` says by itself: summands that have a name (`formulas`), and pairs that are written out.

    `text` is what was given, without spaces.
    """

    text: str
    form: Form
    formulas: tuple[str, ...] = ()
    pairs: LayerPairs = ()

    def check_student(self, student_layers: int) -> None:
        """Check what the student's depth alone decides.

        Raises:
            SettingsError: the mapping names a layer that the student does not have, or leaves out its only one.
        """
        if self.form == "skip" and student_layers == 1:
            raise SettingsError(
                f"--mapping {self.text!r} leaves out the student's last layer, and this student has only that one: "
                "nothing would be learned; choose a --student of 2 layers or more, or --mapping last1"
            )
        check_student_layers((layer for layer, _ in self.pairs), student_layers, f"--mapping {self.text!r}")

    def for_depths(self, teacher_layers: int, student_layers: int) -> LayerMapping:
        """The mapping for two models. See `parse_mapping`.

        Raises:
            SettingsError: it names a layer that does not exist, or cannot be for these depths.
        """
        self.check_student(student_layers)
        pairs = set(self.pairs)
        for name in self.formulas:
            if name not in _FORMULAS:
                pairs.update(_ask_added(name, teacher_layers, student_layers))
                continue
            if student_layers > teacher_layers and name not in _FOR_ANY_DEPTH:
                raise self._too_deep(name, teacher_layers, student_layers)
            pairs.update(_FORMULAS[name](teacher_layers, student_layers))
        # what was written out is checked already, what another package gives is not
        check_student_layers((layer for layer, _ in pairs), student_layers, f"--mapping {self.text!r}")
        check_teacher_layers((layer for _, layer in pairs), teacher_layers, f"--mapping {self.text!r}")
        return LayerMapping(text=self.text, form=self.form, pairs=tuple(sorted(pairs)))

    def _too_deep(self, name: str, teacher_layers: int, student_layers: int) -> SettingsError:
        return SettingsError(
            f"--mapping {self.text!r}: the student has {student_layers} layers, the teacher {teacher_layers}, and "
            f"{name} gives every student layer a teacher layer of its own: choose a --student of at most "
            f"{teacher_layers} layers, or --mapping {', '.join(_FOR_ANY_DEPTH)} or pairs such as "
            f"{student_layers}:{teacher_layers}"
        )


def parse_mapping(text: str, teacher_layers: int, student_layers: int) -> LayerMapping:
    """The mapping that a text names, for two models.

    Args:
        text: see `read_mapping`.
        teacher_layers: the teacher's depth.
        student_layers: the student's depth. Formulas that give each of its layers a teacher layer of its own need a
            student that is not the deeper model.

    Raises:
        SettingsError: the text cannot be read, names a layer that does not exist, or cannot be for these depths.
    """
    return read_mapping(text).for_depths(teacher_layers, student_layers)


def read_mapping(text: str) -> MappingPlan:
    """What `--mapping` says: one of `MAPPINGS`, a sum of those that may stand in one, or pairs `student:teacher`.

    Such a sum is `uniform+last`, such pairs are `1:4,2:8,3:12`, and pairs may stand in a sum too.

    Raises:
        SettingsError: the text cannot be read, or can be for no models.
    """
    parts = text.replace(" ", "").split("+")
    for form in _ALONE:
        if form in parts:
            _check_alone(form, parts, text)
            return MappingPlan(text=form, form=form, formulas=(form,))
    known = {*_SUMMANDS, *added_mappings(text)}
    named = tuple(part for part in parts if part in known)
    pairs = [_read_pair(pair, text) for part in parts if part not in known for pair in part.split(",")]
    check_numbering(pairs, f"--mapping {text!r}")
    return MappingPlan(text="+".join(parts), form="pairs", formulas=named, pairs=tuple(pairs))


def _ask_added(name: str, teacher_layers: int, student_layers: int) -> set[tuple[int, int]]:
    """The pairs of a mapping that another package has added."""
    addition = ADDED_MAPPINGS.find(name)
    assert addition is not None
    given = addition.make(teacher_layers, student_layers)
    try:
        pairs = {(student_layer, teacher_layer) for student_layer, teacher_layer in given}
    except (TypeError, ValueError):
        pairs = set()
    if not pairs or not all(type(layer) is int for pair in pairs for layer in pair):
        raise SettingsError(
            f"--mapping {name!r}: {addition.place} gave {given!r} for a teacher of {teacher_layers} layers and a "
            f"student of {student_layers}, which are no pairs of layers to match: it must give pairs of whole numbers "
            "(student layer, teacher layer), one at least"
        )
    return pairs


def _check_alone(form: Form, parts: list[str], text: str) -> None:
    if parts != [form]:
        raise SettingsError(
            f"--mapping {text!r} adds {form} to something else: it has a loss of its own, counted in its own way, and "
            f"stands alone; give --mapping {form}, or a sum without it"
        )


def _read_pair(pair: str, text: str) -> tuple[int, int]:
    found = as_pair(pair)
    if found is None:
        known = (*MAPPINGS, *ADDED_MAPPINGS.names())
        raise SettingsError(
            f"--mapping {text!r} cannot be read at {pair!r}: {did_you_mean(pair, known)} one of "
            f"{', '.join(known)}, another sum of {', '.join(_SUMMANDS)}, or pairs student:teacher such as "
            "1:4,2:8,3:12"
        )
    return found


def as_pair(text: str) -> tuple[int, int] | None:
    """Layers of a pair such as `2:4`, None if this is none."""
    student_layer, colon, teacher_layer = text.partition(":")
    if not (colon and student_layer.isdecimal() and teacher_layer.isdecimal()):
        return None
    return int(student_layer), int(teacher_layer)


def check_numbering(pairs: Iterable[tuple[int | None, int]], given: str) -> None:
    """Check that layers are numbered from 1.

    Raises:
        SettingsError: one is numbered 0.
    """
    for pair in pairs:
        for owner, layer in zip(("student", "teacher"), pair, strict=True):
            if layer == 0:
                raise SettingsError(
                    f"{given} names layer 0 of the {owner}: layers are numbered from 1, so there is no such layer to "
                    "match; name layers that exist"
                )


def check_student_layers(named: Iterable[int], layers: int, given: str) -> None:
    """Check that a student of so many layers has those named.

    Raises:
        SettingsError: it does not.
    """
    for layer in sorted(named):
        if layer > layers:
            raise SettingsError(
                f"{given} names layer {layer} of the student, which has layers 1 to {layers}: there is no such layer "
                f"to match; choose a --student of {layer} layers or more, or name layers that exist"
            )


def check_teacher_layers(named: Iterable[int], layers: int, given: str) -> None:
    """Check that a teacher of so many layers has those named.

    Raises:
        SettingsError: it does not.
    """
    for layer in sorted(named):
        if layer > layers:
            raise SettingsError(
                f"{given} names layer {layer} of the teacher, which has layers 1 to {layers}: there is no such layer "
                "to match; name layers that exist"
            )
