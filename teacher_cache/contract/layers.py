"""Layer numbering: which teacher layers a student of so many layers learns from, and how many the default one has.

Both commands must agree on this before either has seen the other's flags, so it lives on the shared side. Layers are
numbered from 1. Formulas: Udagawa et al., EMNLP 2023 Industry (arXiv 2310.08797), section 3.
"""

from __future__ import annotations

from teacher_cache.errors import SettingsError


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


def parse_layers(text: str, teacher_layers: int) -> tuple[int, ...]:
    """Layers named by `2,4,6`, `all`, `uniform:N`, `last:N`, or a sum of them such as `uniform:6+last`.

    A name without `:N` takes N from the name before it, or from the default student. Returns ascending layers, each
    once.

    Raises:
        SettingsError: the text cannot be read, or names a layer outside 1..teacher_layers.
    """
    named: set[int] = set()
    depth = default_student_layers(teacher_layers)
    for part in text.replace(" ", "").split("+"):
        name, _, count = part.partition(":")
        if count:
            depth = _whole_number(count, text)
        if name == "all":
            named.update(range(1, teacher_layers + 1))
        elif name in ("uniform", "last"):
            if not 1 <= depth <= teacher_layers:
                raise SettingsError(
                    f"--layers {text!r} asks for a student of {depth} layers, the teacher has {teacher_layers}: "
                    f"give a number from 1 to {teacher_layers}"
                )
            named.update((uniform_layers if name == "uniform" else last_layers)(teacher_layers, depth))
        else:
            named.update(_whole_number(number, text) for number in part.split(","))
    beyond = sorted(layer for layer in named if not 0 <= layer <= teacher_layers)
    if beyond:
        raise SettingsError(
            f"--layers {text!r} names layer {beyond[0]}, the teacher has layers 1 to {teacher_layers} (0 is the "
            "embedding output): there is nothing to keep; name layers that exist"
        )
    return tuple(sorted(named))


def _whole_number(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SettingsError(
            f"--layers {whole!r} cannot be read at {text!r}: give numbers such as 2,4,6, or all, uniform:6, last:6, "
            "uniform:6+last"
        ) from None


def default_relation_heads(teacher_width: int, student_width: int) -> int:
    """Largest common divisor of both widths that is at most teacher_width / 16 (64 at 1024, 48 at 768, 24 at 384)."""
    limit = max(1, teacher_width // 16)
    return next(heads for heads in range(limit, 0, -1) if teacher_width % heads == 0 and student_width % heads == 0)
