"""What a student is trained on: the methods asked for with their weights, layers, heads and trainable projections.

In: settings, the cache's manifest and the student's configuration. Out: an `Objective`, which names the targets it
needs and gives one `LossSum` per method on a batch. Anything that does not fit the cache or the student is refused
here, before the first step. The weighting of the methods and the division by the global batch are the trainer's; the
projections train along and never reach the exported student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig

from student_train.layer_map import LayerPairs, parse_mapping
from student_train.losses import LossSum
from student_train.methods import (
    AttentionTransfer,
    DistributionTransfer,
    HiddenTransfer,
    Method,
    StudentNeeds,
    StudentOutputs,
    projection_name,
)
from teacher_cache.batch import Batch, TargetRequest
from teacher_cache.contract import Manifest
from teacher_cache.errors import SettingsError
from teacher_cache.layers import default_attention_layer, default_relation_heads
from teacher_cache.specs import View


class TargetSource(Protocol):
    """What an objective asks of a cache when it is set up; `teacher_cache.pool.CacheSource` is one."""

    @property
    def manifest(self) -> Manifest: ...

    def require(self, request: TargetRequest) -> None: ...

    def hidden_variance(self, layer: int) -> float: ...


class FloatLinear(nn.Linear):
    """A linear map that computes in float32 even when an engine keeps the whole model in half precision."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        return linear(input.float(), self.weight.float(), self.bias.float())


class Objective(nn.Module):
    """The methods by name, in order, with their weights and their trainable projections."""

    def __init__(self, methods: Mapping[str, Method], weights: Mapping[str, float], projections: nn.ModuleDict) -> None:
        super().__init__()
        self.methods = dict(methods)
        self.weights = dict(weights)
        self.projections = projections

    @property
    def request(self) -> TargetRequest:
        """Every target that some method reads."""
        requests = [method.request for method in self.methods.values()]
        return TargetRequest(
            hidden_layers=tuple(sorted({layer for request in requests for layer in request.hidden_layers})),
            attention_layers=tuple(sorted({layer for request in requests for layer in request.attention_layers})),
            logits=any(request.logits for request in requests),
        )

    def needs(self, view: View) -> StudentNeeds:
        """What the student's forward pass on `view` must give."""
        needs = StudentNeeds()
        for method in self.methods.values():
            needs = needs | method.needs(view)
        return needs

    def forward(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> dict[str, LossSum]:
        """The loss of every method on these rows, unweighted."""
        return {name: method.loss(outputs, batch, self.projections) for name, method in self.methods.items()}

    def describe(self) -> dict[str, Any]:
        """For the provenance record: each method's layers and settings."""
        return {name: method.describe() for name, method in self.methods.items()}


def make_objective(
    weights: Mapping[str, float],
    *,
    source: TargetSource,
    student: PreTrainedConfig,
    mapping: str = "uniform+last",
    attention_layer: int | None = None,
    relation_heads: int | None = None,
    relation_weights: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
) -> Objective:
    """The objective of the methods that `weights` names, in its order, for this student on this cache.

    Args:
        weights: weight of each method: `mha`, `hs`, `od`.
        source: the cache; asked for its manifest, whether it holds the targets, and the variance of hidden states.
        student: the student's configuration.
        mapping: layers of `hs`, see `parse_mapping`.
        attention_layer: teacher layer of `mha`; None for the last but one, or what the cache has where it lacks that.
        relation_heads: heads of `mha`; None for the largest common divisor of both widths up to teacher width / 16.
        relation_weights: of the query, key and value relations.
        seed: of projections between different widths.

    Raises:
        SettingsError: heads, layers or a vocabulary that do not fit.
        TargetsError: the cache lacks what the methods read.
    """
    manifest = source.manifest
    layer = _choose_attention_layer(manifest, attention_layer)
    pairs = parse_mapping(mapping, manifest.teacher.layers, student.num_hidden_layers) if "hs" in weights else ()
    # of all methods at once: whoever has to build another store should learn everything that it must hold
    source.require(
        TargetRequest(
            hidden_layers=tuple(sorted({teacher_layer for _, teacher_layer in pairs})),
            attention_layers=(layer,) if "mha" in weights else (),
            logits="od" in weights,
        )
    )
    methods: dict[str, Method] = {}
    for name in weights:
        if name == "mha":
            methods[name] = _attention_transfer(manifest, student, layer, relation_heads, relation_weights)
        elif name == "hs":
            methods[name] = _hidden_transfer(source, mapping, pairs)
        elif name == "od":
            methods[name] = _distribution_transfer(manifest, student)
        else:
            raise ValueError(f"unknown method {name!r}")
    projections = _make_projections(pairs, student.hidden_size, manifest.teacher.hidden_size, seed)
    return Objective(methods, weights, projections)


def _attention_transfer(
    manifest: Manifest, student: PreTrainedConfig, layer: int, heads: int | None, weights: Sequence[float]
) -> AttentionTransfer:
    width = student.hidden_size
    spec = manifest.targets.find_attention(layer)
    assert spec is not None
    if spec.heads is not None:
        _check_stored_heads(spec.heads, heads, width)
        heads = spec.heads
    elif heads is None:
        heads = default_relation_heads(manifest.teacher.hidden_size, width)
    _check_relation_heads(heads, manifest.teacher.hidden_size, width)
    return AttentionTransfer(
        view=spec.view,
        student_layer=student.num_hidden_layers,
        teacher_layer=layer,
        relation_heads=heads,
        weights=tuple(weights),
    )


def _choose_attention_layer(manifest: Manifest, asked: int | None) -> int:
    if asked is None:
        return _cached_attention_layer(manifest)
    layers = manifest.teacher.layers
    if not 1 <= asked <= layers:
        raise SettingsError(
            f"--attention-layer {asked!r}: the teacher has layers 1 to {layers}, so no cache of it can hold that one; "
            "give one of these layers"
        )
    return asked


def _cached_attention_layer(manifest: Manifest) -> int:
    """The only layer whose attention is cached, or the default one where the cache leaves a choice or has none."""
    cached = manifest.targets.attention_layers()
    default = default_attention_layer(manifest.teacher.layers)
    return default if default in cached or not cached else cached[-1]


def _check_relation_heads(heads: int, teacher_width: int, student_width: int) -> None:
    if heads >= 1 and teacher_width % heads == 0 and student_width % heads == 0:
        return
    possible = [n for n in range(1, student_width + 1) if teacher_width % n == 0 and student_width % n == 0]
    below = [n for n in possible if n < heads][-1:]
    above = [n for n in possible if n > heads][:1]
    raise SettingsError(
        f"--relation-heads {heads!r} does not divide both the teacher's width {teacher_width} and the student's width "
        f"{student_width}: every relation head must get the same number of components; the nearest that does is "
        f"{' or '.join(map(str, below + above))}"
    )


def _check_stored_heads(stored: int, asked: int | None, student_width: int) -> None:
    if asked is not None and asked != stored:
        raise SettingsError(
            f"--relation-heads {asked!r}: the cache holds relations as matrices of {stored} heads, and others cannot "
            f"be made of them; give --relation-heads {stored}, or build a cache with --relations hidden or qkv"
        )
    if student_width % stored:
        raise SettingsError(
            f"the cache holds relations as matrices of {stored} heads, which do not divide the student's width "
            f"{student_width}: every relation head must get the same number of components; choose a student whose "
            "width they divide, or build a cache with --relations hidden or qkv"
        )


def _hidden_transfer(source: TargetSource, mapping: str, pairs: LayerPairs) -> HiddenTransfer:
    layers = sorted({teacher_layer for _, teacher_layer in pairs})
    return HiddenTransfer(
        mapping=mapping,
        pairs=pairs,
        views={spec.layer: spec.view for spec in source.manifest.targets.hidden if spec.layer in layers},
        variance={layer: source.hidden_variance(layer) for layer in layers},
    )


def _distribution_transfer(manifest: Manifest, student: PreTrainedConfig) -> DistributionTransfer:
    spec = manifest.targets.logits
    assert spec is not None
    if student.vocab_size != manifest.teacher.vocab_size:
        raise SettingsError(
            f"--method od: the student has {student.vocab_size} vocabulary entries, the teacher "
            f"{manifest.teacher.vocab_size}: their distributions cannot be compared; choose a student with the "
            "teacher's vocabulary"
        )
    return DistributionTransfer(
        view=spec.view, form=spec.form, vocab_size=student.vocab_size, temperature=manifest.temperature
    )


def _make_projections(
    pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int, seed: int
) -> nn.ModuleDict:
    """One linear map per pair: identity where the widths match, else random with standard deviation 0.02; bias 0."""
    generator = torch.Generator().manual_seed(seed)
    projections = nn.ModuleDict()
    for student_layer, teacher_layer in pairs:
        projection = FloatLinear(student_width, teacher_width)
        nn.init.zeros_(projection.bias)
        if student_width == teacher_width:
            nn.init.eye_(projection.weight)
        else:
            nn.init.normal_(projection.weight, std=0.02, generator=generator)
        projections[projection_name(student_layer, teacher_layer)] = projection
    return projections
