"""The shape of an encoder, and the configuration of a student of another shape than its teacher's.

Shapes are read from text and from configurations of any family: the sizes are found and set under the names that the
family gives them. Numbers and records only; no model is made here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedConfig

from teacher_cache.contract.layers import default_student_layers
from teacher_cache.errors import SettingsError, StudentError

SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+)(?::(\d+))?)?")
_FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """Layers, hidden width, attention heads and feed-forward width of an encoder."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden_size}:{self.heads}:{self.intermediate_size}"


def parse_shape(text: str, *, teacher_heads: int | None = None, feed_forward_ratio: float = 4.0) -> StudentShape:
    """Read `LAYERSxWIDTH[:HEADS[:FEED_FORWARD]]`, such as `3x384` or `6x768:12:3072`.

    Heads left out are the teacher's if they divide the width, else `default_heads`; a feed-forward width left out is
    `feed_forward_ratio` times the width.

    Raises:
        SettingsError: the text cannot be read, a number is 0, or the heads do not divide the width.
    """
    found = SHAPE.fullmatch(text)
    if found is None or any(int(number) == 0 for number in found.groups() if number is not None):
        raise SettingsError(
            f"--student {text!r} is neither a shape nor a folder: give layers x width[:heads[:feed-forward]], such as "
            "3x384 or 6x768:12:3072, or the path of a Hugging Face model folder"
        )
    layers, width = int(found[1]), int(found[2])
    if found[3] is not None:
        heads = int(found[3])
    else:
        heads = teacher_heads if teacher_heads and width % teacher_heads == 0 else default_heads(width)
    if width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - heads))
        raise SettingsError(
            f"--student {text!r}: {heads} attention heads do not divide the width {width}, every head must get the "
            f"same number of components; the nearest number of heads that does is {nearest}"
        )
    feed_forward = int(found[4]) if found[4] is not None else round(feed_forward_ratio * width)
    return StudentShape(layers=layers, hidden_size=width, heads=heads, intermediate_size=feed_forward)


def default_spec(teacher: StudentShape) -> str:
    """The student where none is named: 6 layers, or half of fewer than 12; width min(768, teacher's)."""
    return f"{default_student_layers(teacher.layers)}x{min(768, teacher.hidden_size)}"


def default_heads(width: int) -> int:
    """Heads of 64 components where the width allows, of 32 for narrow ones, else the nearest divisor below."""
    wanted = max(1, width // (64 if width >= 512 else 32))
    return next(heads for heads in range(wanted, 0, -1) if width % heads == 0)


def student_shape(spec: str | None, teacher_config: PreTrainedConfig) -> StudentShape:
    """The shape that `spec` asks for, or the teacher's default student; proportions left out are the teacher's.

    Raises:
        SettingsError: as `parse_shape`, or the student would be deeper than the teacher.
    """
    teacher = shape_of(teacher_config)
    ratio = teacher.intermediate_size / teacher.hidden_size
    if spec is None:
        spec = default_spec(teacher)
    shape = parse_shape(spec, teacher_heads=teacher.heads, feed_forward_ratio=ratio)
    if shape.layers > teacher.layers:
        raise SettingsError(
            f"--student {spec!r} has {shape.layers} layers, the teacher {teacher.layers}: no layer mapping is defined "
            f"for a deeper student; choose at most {teacher.layers} layers"
        )
    return shape


def shape_of(config: PreTrainedConfig) -> StudentShape:
    """The shape that a configuration describes, whatever its family calls the sizes."""
    return StudentShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate_size=getattr(config, _feed_forward_name(config)),
    )


def derive_config(teacher: PreTrainedConfig, shape: StudentShape, layers: tuple[int, ...]) -> PreTrainedConfig:
    """The teacher's configuration at another shape; settings kept per layer are those of the teacher's `layers`.

    Dropout rates, positions, vocabulary and, in families that have one, the embedding width stay the teacher's.
    """
    values = teacher.to_dict()
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        _feed_forward_name(teacher): shape.intermediate_size,
    }
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == teacher.num_hidden_layers:
            values[name] = [value[layer - 1] for layer in layers]
    values.update({teacher.attribute_map.get(name, name): size for name, size in sizes.items()})
    for leftover in ("architectures", "dtype", "_name_or_path", "transformers_version"):
        values.pop(leftover, None)
    config: PreTrainedConfig = type(teacher).from_dict(values)
    return config


def _feed_forward_name(config: PreTrainedConfig) -> str:
    for name in _FEED_FORWARD_NAMES:
        if hasattr(config, name):
            return name
    raise StudentError(
        f"family {config.model_type!r} names its feed-forward width in none of the known ways {_FEED_FORWARD_NAMES}: "
        "no student of another shape can be derived; give --student a Hugging Face folder of the shape you want"
    )
