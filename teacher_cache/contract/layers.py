"""Layer numbering: which teacher layers a student of so many layers learns from, and how many the default one has.

Both commands must agree on this before either has seen the other's flags, so it lives on the shared side. Layers are
numbered from 1. Formulas: Udagawa et al., EMNLP 2023 Industry (arXiv 2310.08797), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean


def uniform_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """phi(i) = floor(i * k + 1/2), k = teacher_layers / student_layers, for student layers i = 1, 2, ..."""
    # in integers: i * k + 1/2 = (2 i T + S) / (2 S), exact where floating point would round k
    return tuple(
        (2 * i * teacher_layers + student_layers) // (2 * student_layers) for i in range(1, student_layers + 1)
    )


def last_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """phi(i) = teacher_layers - student_layers + i for student layers i = 1, 2, ..."""
    return tuple(teacher_layers - student_layers + i for i in range(1, student_layers + 1))


def default_attention_layer(teacher_layers: int) -> int:
    """The layer whose attention relations are distilled: the last but one."""
    return max(1, teacher_layers - 1)


def default_student_layers(teacher_layers: int) -> int:
    """Depth of the default student: 6 for teachers of 12 layers or more, else half of the teacher's."""
    return 6 if teacher_layers >= 12 else max(1, teacher_layers // 2)


@dataclass(frozen=True, kw_only=True)
class LayersPart:
    """A summand of `--layers`: a name with the depth that is given for it, if one is, or numbers of layers."""

    name: str = ""
    depth: int | None = None
    layers: tuple[int, ...] = ()


def parse_layers(text: str, teacher_layers: int) -> tuple[int, ...]:
    """The layers that a text names, for a teacher. Returns ascending layers, each once.

    Args:
        text: see `read_layers`. A name without `:N` takes N from the name before it, or from the default student.
        teacher_layers: the teacher's depth.

    Raises:
        SettingsError: the text cannot be read, or names a layer outside 1..teacher_layers.
    """
    named: set[int] = set()
    depth = default_student_layers(teacher_layers)
    for part in read_layers(text):
        depth = part.depth or depth
        if part.name == "all":
            named.update(range(1, teacher_layers + 1))
        elif part.name:
            if depth > teacher_layers:
                raise SettingsError(
                    f"--layers {text!r} asks for a student of {depth} layers, the teacher has {teacher_layers}: "
                    f"give a number from 1 to {teacher_layers}"
                )
            named.update(_FORMULAS[part.name](teacher_layers, depth))
        else:
            named.update(part.layers)
    beyond = sorted(layer for layer in named if layer > teacher_layers)
    if beyond:
        raise SettingsError(
            f"--layers {text!r} names layer {beyond[0]}, the teacher has layers 1 to {teacher_layers} (0 is the "
            "embedding output): there is nothing to keep; name layers that exist"
        )
    return tuple(sorted(named))


def read_layers(text: str) -> tuple[LayersPart, ...]:
    """What `--layers` says by itself: `2,4,6`, `all`, `uniform:N`, `last:N`, or a sum of them such as `uniform:6+last`.

    Raises:
        SettingsError: the text cannot be read, or can be for no teacher.
    """
    return tuple(_read_part(part, text) for part in text.replace(" ", "").split("+"))


def _read_part(part: str, text: str) -> LayersPart:
    name, _, count = part.partition(":")
    depth = _whole_number(count, text) if count else None
    if depth is not None and depth < 1:
        raise SettingsError(f"--layers {text!r} asks for a student of {depth} layers: give 1 or more")
    if name == "all" or name in _FORMULAS:
        return LayersPart(name=name, depth=depth)
    layers = tuple(_whole_number(number, text) for number in part.split(","))
    if min(layers) < 0:
        raise SettingsError(
            f"--layers {text!r} names layer {min(layers)}: layers are numbered from 1, and 0 is the embedding output; "
            "name layers that exist"
        )
    return LayersPart(layers=layers)


def _whole_number(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError:
        names = did_you_mean(text.partition(":")[0], ("all", *_FORMULAS))
        raise SettingsError(
            f"--layers {whole!r} cannot be read at {text!r}: {names} numbers such as 2,4,6, or all, uniform:6, last:6, "
            "uniform:6+last"
        ) from None


_FORMULAS = {"uniform": uniform_layers, "last": last_layers}


def default_relation_heads(teacher_width: int, student_width: int) -> int:
    """Largest common divisor of both widths that is at most teacher_width / 16 (64 at 1024, 48 at 768, 24 at 384)."""
    limit = max(1, teacher_width // 16)
    return next(heads for heads in range(limit, 0, -1) if teacher_width % heads == 0 and student_width % heads == 0)
