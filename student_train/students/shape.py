"""The shape that a configuration describes, and the configuration of a student of another shape than its teacher's.

The sizes are found and set under the names that each family gives them. Configurations only; no model is made here.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from student_train.student_shape import AskedShape, StudentShape, read_shape
from teacher_cache.contract.layers import default_student_layers
from teacher_cache.errors import SettingsError, StudentError

_KEPT_PER_LAYER = ("attention_window",)
"""Settings kept per layer whose names do not say so."""
_FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "ffn_dim")


def default_spec(teacher: StudentShape) -> str:
    """The student where none is named: 6 layers, or half of fewer than 12; width min(768, teacher's)."""
    return f"{default_student_layers(teacher.layers)}x{min(768, teacher.hidden_size)}"


def student_shape(asked: AskedShape | None, teacher_config: PreTrainedConfig) -> StudentShape:
    """The shape that was asked for, or the teacher's default student; proportions left out are the teacher's.

    Raises:
        SettingsError: the student would be deeper than the teacher.
    """
    teacher = shape_of(teacher_config)
    asked = asked or read_shape(default_spec(teacher))
    if asked.layers > teacher.layers:
        raise SettingsError(
            f"--student {asked.text!r} has {asked.layers} layers, the teacher {teacher.layers}: no layer mapping is "
            f"defined for a deeper student; choose at most {teacher.layers} layers"
        )
    ratio = teacher.intermediate_size / teacher.hidden_size
    return asked.completed(teacher_heads=teacher.heads, feed_forward_ratio=ratio)


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
    sizes |= _head_sizes(teacher, shape)
    for name, value in values.items():
        kept_per_layer = "layer" in name or name in _KEPT_PER_LAYER
        if kept_per_layer and isinstance(value, list) and len(value) == teacher.num_hidden_layers:
            values[name] = [value[layer - 1] for layer in layers]
    if "per_layer_config" in values:
        kept = {int(index): settings for index, settings in values["per_layer_config"].items()}
        chosen = {number: kept.get(layer - 1) for number, layer in enumerate(layers)}
        values["per_layer_config"] = {number: settings for number, settings in chosen.items() if settings is not None}
    values.update({teacher.attribute_map.get(name, name): size for name, size in sizes.items()})
    for leftover in ("architectures", "dtype", "_name_or_path", "transformers_version"):
        values.pop(leftover, None)
    config: PreTrainedConfig = type(teacher).from_dict(values)
    return config


def _head_sizes(teacher: PreTrainedConfig, shape: StudentShape) -> dict[str, int]:
    """Sizes that families keep beside those of the shape and that follow from it: the width of a head, key heads.

    Heads share keys and values in the teacher's proportion, where that can be.
    """
    sizes = {}
    head_width, key_heads = getattr(teacher, "head_dim", None), getattr(teacher, "num_key_value_heads", None)
    heads = teacher.num_attention_heads
    if head_width is not None and (shape.hidden_size, shape.heads) != (teacher.hidden_size, heads):
        sizes["head_dim"] = shape.hidden_size // shape.heads
    if key_heads is not None and shape.heads != heads:
        sharing = heads // key_heads
        sizes["num_key_value_heads"] = shape.heads // sharing if shape.heads % sharing == 0 else shape.heads
    return sizes


def _feed_forward_name(config: PreTrainedConfig) -> str:
    for name in _FEED_FORWARD_NAMES:
        if hasattr(config, name):
            return name
    raise StudentError(
        f"family {config.model_type!r} names its feed-forward width in none of the known ways {_FEED_FORWARD_NAMES}: "
        "no student of another shape can be derived; give --student a Hugging Face folder of the shape you want"
    )
