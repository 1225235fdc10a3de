"""The shape that a configuration describes, and the configuration of a student of another shape than its teacher's.

The sizes are found and set under the names that each family gives them. Configurations only; no model is made here.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from student_train.student_shape import AskedShape, StudentShape, read_shape
from teacher_cache.contract.layers import default_student_layers
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import kind_of

_KEPT_PER_LAYER = ("attention_window",)
"""Settings kept per layer whose names do not say so."""
_FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "n_inner")
_KEY_HEAD_NAMES = ("num_key_value_heads", "num_kv_heads")
_AS_WIDE_AS_STATES = ("word_embed_proj_dim",)
"""Widths that a family may set apart from the hidden one, and that follow it where the teacher's are the same."""


def default_spec(teacher: StudentShape) -> str:
    """The student where none is named: 6 layers, or half of fewer than 12; width min(768, teacher's)."""
    return f"{default_student_layers(teacher.layers)}x{min(768, teacher.hidden_size)}"


def student_shape(asked: AskedShape | None, teacher_config: PreTrainedConfig) -> StudentShape:
    """The shape that was asked for, or the teacher's default student; proportions left out are the teacher's.

    Raises:
        SettingsError: the student would be deeper than the teacher, or its heads are to share keys and values as its
            family cannot.
    """
    teacher = shape_of(teacher_config)
    asked = asked or read_shape(default_spec(teacher))
    if asked.layers > teacher.layers:
        raise SettingsError(
            f"--student {asked.text!r} has {asked.layers} layers, the teacher {teacher.layers}: no layer mapping is "
            f"defined for a deeper student; choose at most {teacher.layers} layers"
        )
    ratio = teacher.intermediate_size / teacher.hidden_size
    # components that positions turn can be taken over by heads of the same width, or half of it
    turned = kind_of(teacher_config) == "causal-lm" and getattr(teacher_config, "rope_parameters", None)
    keeps_width = asked.hidden_size == teacher.hidden_size
    shape = asked.completed(
        teacher_heads=teacher.heads,
        feed_forward_ratio=ratio,
        teacher_key_value_heads=teacher.key_value_heads,
        teacher_head_width=head_width(teacher_config) if turned and not keeps_width else None,
    )
    _key_head_settings(teacher_config, shape)
    return shape


def shape_of(config: PreTrainedConfig) -> StudentShape:
    """The shape that a configuration describes, whatever its family calls the sizes.

    Raises:
        StudentError: the feed-forward width cannot be told.
    """
    heads, key_heads = config.num_attention_heads, _key_heads(config)
    return StudentShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=heads,
        intermediate_size=_feed_forward_width(config),
        key_value_heads=None if key_heads == heads else key_heads,
    )


def shape_in_words(config: PreTrainedConfig) -> str:
    """The shape as text, without the feed-forward width where that cannot be told."""
    try:
        return str(shape_of(config))
    except StudentError:
        return f"{config.num_hidden_layers}x{config.hidden_size}:{config.num_attention_heads}"


def head_width(config: PreTrainedConfig) -> int:
    """Components of each attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def derive_config(teacher: PreTrainedConfig, shape: StudentShape, layers: tuple[int, ...]) -> PreTrainedConfig:
    """The teacher's configuration at another shape; settings kept per layer are those of the teacher's `layers`.

    Dropout rates, positions, vocabulary and, in families that have one, the embedding width stay the teacher's.
    """
    values = teacher.to_dict()
    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        _feed_forward_name(teacher): shape.intermediate_size,
    }
    sizes |= _head_sizes(teacher, shape) | _key_head_settings(teacher, shape)
    sizes |= {
        name: shape.hidden_size for name in _AS_WIDE_AS_STATES if getattr(teacher, name, None) == teacher.hidden_size
    }
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


def _head_sizes(teacher: PreTrainedConfig, shape: StudentShape) -> dict[str, Any]:
    """The width of a head where a family keeps it, and the scale of attention that follows from it.

    Heads are as wide as the shape makes them; in a student of the teacher's width and heads, as the teacher's are.
    """
    if (shape.hidden_size, shape.heads) == (teacher.hidden_size, teacher.num_attention_heads):
        return {}
    sizes, width = {}, shape.hidden_size // shape.heads
    if _keeps(teacher, "head_dim") and getattr(teacher, "head_dim", None) is not None:
        sizes["head_dim"] = width
    # Gemma divides by the root of this number, the width of a head or the hidden width shared among them
    if getattr(teacher, "query_pre_attn_scalar", None) in (
        head_width(teacher),
        teacher.hidden_size // teacher.num_attention_heads,
    ):
        sizes["query_pre_attn_scalar"] = width
    return sizes


def _key_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values; as many as of queries where a family knows no others."""
    heads: int = config.num_attention_heads
    if _is_all_or_none(config):
        return 1 if config.multi_query else heads
    named = (getattr(config, name, None) for name in _KEY_HEAD_NAMES)
    return next((number for number in named if number), heads)


def _is_all_or_none(config: PreTrainedConfig) -> bool:
    """Whether heads share one key head or none, as in GPT-BigCode and the first Falcon."""
    return hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False)


def _key_head_settings(teacher: PreTrainedConfig, shape: StudentShape) -> dict[str, Any]:
    """How the teacher's family says that heads share keys and values as they do in `shape`.

    Raises:
        SettingsError: it cannot.
    """
    wanted = shape.key_value_heads or shape.heads
    names = [name for name in _KEY_HEAD_NAMES if _keeps(teacher, name)]
    if _is_all_or_none(teacher):
        if wanted not in (1, shape.heads):
            raise SettingsError(
                f"student {shape}: in family {teacher.model_type!r} all heads share one of keys and values, or none "
                f"does, and {wanted} of {shape.heads} cannot be; ask for 1 or {shape.heads} key/value heads"
            )
        return {"multi_query": wanted == 1, **dict.fromkeys(names, wanted)}
    if names:
        return dict.fromkeys(names, wanted)
    if wanted != shape.heads:
        raise SettingsError(
            f"student {shape}: in family {teacher.model_type!r} every head has keys and values of its own, and "
            f"{wanted} cannot be shared by {shape.heads}; leave the key/value heads out"
        )
    return {}


def _keeps(config: PreTrainedConfig, name: str) -> bool:
    """Whether a size is a setting of its own, and not worked out from others."""
    return config.attribute_map.get(name, name) in config.to_dict()


def _feed_forward_width(config: PreTrainedConfig) -> int:
    # where it is left open it is 4 times the hidden width in every family
    width = getattr(config, _feed_forward_name(config)) or 4 * config.hidden_size
    if not isinstance(width, int):
        raise StudentError(
            f"family {config.model_type!r} has a feed-forward width for each layer ({width!r}): no student of another "
            "shape can be derived; give --student a Hugging Face folder of the shape you want"
        )
    return width


def _feed_forward_name(config: PreTrainedConfig) -> str:
    for name in _FEED_FORWARD_NAMES:
        if hasattr(config, name):
            return name
    raise StudentError(
        f"family {config.model_type!r} names its feed-forward width in none of the known ways {_FEED_FORWARD_NAMES}: "
        "no student of another shape can be derived; give --student a Hugging Face folder of the shape you want"
    )
