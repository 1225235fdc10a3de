"""Which student layers learn the attention of which teacher layers, and what that asks of cache and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from student_train.attention_layers import read_attention_layers
from student_train.layer_map import LayerPairs
from student_train.methods.base import StudentNeeds
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.layers import default_attention_layer
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import AttentionSpec, View


def attention_pairs(manifest: Manifest, student: PreTrainedConfig, asked: str | None) -> LayerPairs:
    """Pairs (student layer, teacher layer) that `--attention-layer` names; one for the student's last layer by default.

    Args:
        manifest: of the cache; where nothing is asked for, what it holds decides.
        student: the student's configuration.
        asked: None, a teacher layer such as `5`, or pairs `student:teacher` such as `2:4,3:5`.

    Raises:
        SettingsError: the text cannot be read, or a layer does not exist.
    """
    teacher_layers, student_layers = manifest.teacher.layers, student.num_hidden_layers
    if asked is None:
        return ((student_layers, cached_layer(manifest)),)
    return read_attention_layers(asked).for_depths(teacher_layers, student_layers)


def spec_of(manifest: Manifest, layer: int) -> AttentionSpec:
    """How the cache holds the attention of a layer that it holds."""
    spec = manifest.targets.find_attention(layer)
    assert spec is not None
    return spec


def views_of_pairs(manifest: Manifest, pairs: LayerPairs) -> dict[int, View]:
    """The view that each teacher layer's attention was computed in."""
    return {layer: spec_of(manifest, layer).view for _, layer in pairs}


def request_of(pairs: LayerPairs) -> TargetRequest:
    """What these pairs read of the cache."""
    return TargetRequest(attention_layers=tuple(sorted({layer for _, layer in pairs})))


def needs_of(pairs: LayerPairs, views: Mapping[int, View], view: View) -> StudentNeeds:
    """What the student must compute in one view."""
    return StudentNeeds(attention_layers=frozenset(student for student, teacher in pairs if views[teacher] == view))


def describe_pairs(pairs: LayerPairs, weights: Sequence[float], views: Mapping[int, View]) -> dict[str, Any]:
    """The pairs as provenance keeps them."""
    return {
        "pairs": [list(pair) for pair in pairs],
        "weights": list(weights),
        "view": "+".join(sorted(set(views.values()))),
    }


def cached_layer(manifest: Manifest) -> int:
    """The only layer whose attention is cached, or the default one where the cache leaves a choice or has none."""
    cached = manifest.targets.attention_layers()
    default = default_attention_layer(manifest.teacher.layers)
    return default if default in cached or not cached else cached[-1]
