"""In how many heads vectors of both models are related, and what each position is related to.

Queries have A_q relation heads. Keys and values have A_kv of their own: where several query heads share them they are
narrower, and to repeat them to the number of queries would only repeat their relations. Both follow from widths, by the
same rule as of encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from student_train.methods.attention_pairs import spec_of
from teacher_cache.contract.layers import default_relation_heads
from teacher_cache.contract.manifest import Manifest
from teacher_cache.errors import SettingsError

RelationMask = Literal["causal", "full"]
Widths = tuple[int, int, int]
"""Of queries, keys and values, all heads side by side."""


@dataclass(frozen=True, kw_only=True)
class RelationFlags:
    """What was asked for of relations; None where the default is wanted."""

    heads: int | None = None
    key_value_heads: int | None = None
    mask: RelationMask | None = None


def vector_widths(config: PreTrainedConfig) -> Widths:
    """Widths of a model's queries, keys and values; where queries share keys and values, those are narrower.

    Families whose keys and values come from one latent vector (DeepSeek, MiniCPM3) have them for every head, in widths
    of their own.
    """
    heads = config.num_attention_heads
    # MobileBERT's attention is narrower than its hidden states
    width = getattr(config, "true_hidden_size", None) or config.hidden_size
    head_width = getattr(config, "head_dim", None) or width // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    latent_query, latent_value = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    if latent_query and latent_value:
        return heads * latent_query, heads * latent_query, heads * latent_value
    return heads * head_width, shared, shared


def taught_widths(manifest: Manifest, layers: Sequence[int]) -> Widths:
    """Widths of the teacher's vectors; of several layers, what divides them all."""
    each = [spec_of(manifest, layer).vector_widths(manifest.teacher.hidden_size) for layer in layers]
    query, key, value = (math.gcd(*widths) for widths in zip(*each, strict=True))
    return query, key, value


def default_heads(taught: Widths, student: Widths) -> tuple[int, int]:
    """A_q and A_kv: the largest common divisors of both models' widths up to a sixteenth of the teacher's."""
    return (
        default_relation_heads(taught[0], student[0]),
        default_relation_heads(math.gcd(*taught[1:]), math.gcd(*student[1:])),
    )


def choose_heads(
    manifest: Manifest, layers: Sequence[int], student: PreTrainedConfig, asked: RelationFlags
) -> tuple[int, int]:
    """A_q and A_kv of these teacher layers, all of which the cache holds, and this student.

    Raises:
        SettingsError: what was asked for does not divide both widths.
    """
    taught, own = taught_widths(manifest, layers), vector_widths(student)
    alike = len(set(taught)) == len(set(own)) == 1
    heads, key_value_heads = default_heads(taught, own)
    if asked.heads is not None:
        heads = asked.heads
        key_value_heads = heads if alike else key_value_heads
    if asked.key_value_heads is not None:
        key_value_heads = asked.key_value_heads
    _check("--relation-heads", "" if alike else "query ", heads, taught[0], own[0])
    for place, kind in ((1, "key "), (2, "value ")):
        flag = "--relation-heads" if asked.key_value_heads is None else "--relation-heads-kv"
        _check(flag, "" if alike else kind, key_value_heads, taught[place], own[place])
    return heads, key_value_heads


def _check(flag: str, kind: str, heads: int, teacher_width: int, student_width: int) -> None:
    if heads >= 1 and teacher_width % heads == 0 and student_width % heads == 0:
        return
    possible = [n for n in range(1, student_width + 1) if teacher_width % n == 0 and student_width % n == 0]
    below = [n for n in possible if n < heads][-1:]
    above = [n for n in possible if n > heads][:1]
    raise SettingsError(
        f"{flag} {heads!r} does not divide both the teacher's {kind}width {teacher_width} and the student's "
        f"{kind}width {student_width}: every relation head must get the same number of components; the nearest that "
        f"does is {' or '.join(map(str, below + above))}"
    )


def choose_mask(manifest: Manifest, asked: RelationMask | None) -> RelationMask | None:
    """What `mha` relates positions to: of a causal teacher what it sees, if nothing else is asked for; None of others.

    Raises:
        SettingsError: a causal mask for a teacher that sees both sides.
    """
    if manifest.teacher.causal:
        return asked or "causal"
    if asked == "causal":
        raise SettingsError(
            f"--relation-mask 'causal': the teacher {manifest.teacher.name!r} is a masked LM, each of whose positions "
            "sees those on both sides, and half of what there is to learn would be left out; leave the flag out, or "
            "give a cache of a causal teacher"
        )
    return None
