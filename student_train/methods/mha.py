"""The methods that learn attention: relations of queries, keys and values (`mha`), or these themselves (`direct`).

In: the pairs of layers asked for and what the cache holds, then what the student computed and the decoded targets of
the same rows. Out: one `LossSum` per batch, the sum over the pairs. `direct` needs vectors, so matrices of relations in
a cache do not serve it, and its maps from the student's vectors to the teacher's train along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from student_train.layer_map import LayerPairs, parse_pairs
from student_train.losses.relations import relation_loss, vectors_loss
from student_train.losses.sums import LossSum, add_losses
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from student_train.methods.projections import make_map, projection_name
from teacher_cache.contract.batch import AttentionVectors, Batch, TargetRequest
from teacher_cache.contract.layers import default_attention_layer, default_relation_heads
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import View
from teacher_cache.errors import SettingsError, TargetsError
from teacher_cache.models.attention import VECTORS

VARIANCE_ROWS = 64
"""Rows of the cache, the first ones, that the variance of attention vectors is measured on."""


class VectorSource(Protocol):
    """What is asked of a cache: what it holds, and some of its rows."""

    @property
    def manifest(self) -> Manifest: ...

    def read_rows(self, start: int, stop: int, request: TargetRequest) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """`mha`: attention relations of teacher layers to student layers (MiniLMv2)."""

    pairs: LayerPairs
    views: Mapping[int, View]
    relation_heads: int
    weights: tuple[float, ...]
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return _request(self.pairs)

    def needs(self, view: View) -> StudentNeeds:
        return _needs(self.pairs, self.views, view)

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.pairs:
            view = self.views[teacher_layer]
            losses.append(
                relation_loss(
                    outputs[view].attention[student_layer],
                    batch[view].attention[teacher_layer],
                    batch[view].length_B,
                    heads=self.relation_heads,
                    weights=self.weights,
                )
            )
        return add_losses(losses)

    def describe(self) -> dict[str, Any]:
        return {"relation_heads": self.relation_heads, **_describe(self.pairs, self.weights, self.views)}


@dataclass(frozen=True, kw_only=True)
class VectorTransfer:
    """`direct`: queries, keys and values of teacher layers, through one learned linear map each (DirectMiniLM).

    `variances` are those of the teacher's three vectors, by layer.
    """

    pairs: LayerPairs
    views: Mapping[int, View]
    variances: Mapping[int, tuple[float, ...]]
    weights: tuple[float, ...]
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return _request(self.pairs)

    def needs(self, view: View) -> StudentNeeds:
        return _needs(self.pairs, self.views, view)

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.pairs:
            view = self.views[teacher_layer]
            teacher = batch[view].attention[teacher_layer]
            assert isinstance(teacher, AttentionVectors)
            losses.append(
                vectors_loss(
                    outputs[view].attention[student_layer],
                    teacher,
                    batch[view].real_BT(),
                    {name: projections[_map_name(name, student_layer, teacher_layer)] for name in self._learned()},
                    variances=self.variances[teacher_layer],
                    weights=self.weights,
                )
            )
        return add_losses(losses)

    def mapped(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """See `MapsVectors`."""
        for student_layer, teacher_layer in self.pairs:
            targets, given = batch[self.views[teacher_layer]], outputs[self.views[teacher_layer]]
            real_BT, both = targets.real_BT(), (given.attention[student_layer], targets.attention[teacher_layer])
            for name in self._learned():
                student_ND, teacher_ND = (getattr(each, f"{name}_BTD")[real_BT] for each in both)
                yield _map_name(name, student_layer, teacher_layer), student_ND, teacher_ND

    def _learned(self) -> tuple[str, ...]:
        return tuple(name for name, weight in zip(VECTORS, self.weights, strict=True) if weight)

    def describe(self) -> dict[str, Any]:
        return _describe(self.pairs, self.weights, self.views)


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
        return ((student_layers, _cached_layer(manifest)),)
    text = asked.replace(" ", "")
    pairs = f"{student_layers}:{text}" if text.isdecimal() else text
    return parse_pairs(pairs, teacher_layers, student_layers, given=f"--attention-layer {asked!r}")


def make_attention_transfer(
    manifest: Manifest, student: PreTrainedConfig, pairs: LayerPairs, heads: int | None, weights: Sequence[float]
) -> AttentionTransfer:
    """`mha` of these pairs, all of which the cache holds.

    Args:
        manifest: of the cache.
        student: the student's configuration.
        pairs: see `attention_pairs`.
        heads: relation heads; None for those of stored matrices, or else the largest common divisor of both widths up
            to a sixteenth of the teacher's.
        weights: of the query, key and value relations.

    Raises:
        SettingsError: the heads do not divide both widths, or are not those of stored matrices.
    """
    width = student.hidden_size
    stored = {layer: _spec(manifest, layer).heads for _, layer in pairs}
    held = {count for count in stored.values() if count is not None}
    if len(held) > 1:
        by_layer = ", ".join(f"{count} at layer {layer}" for layer, count in stored.items() if count is not None)
        raise SettingsError(
            f"the cache holds relations as matrices of different numbers of heads ({by_layer}): relations of one "
            "method are compared in the same heads; name layers of one number with --attention-layer"
        )
    if held:
        heads = _check_stored_heads(*held, asked=heads, student_width=width)
    elif heads is None:
        heads = default_relation_heads(manifest.teacher.hidden_size, width)
    _check_relation_heads(heads, manifest.teacher.hidden_size, width)
    return AttentionTransfer(pairs=pairs, views=_views(manifest, pairs), relation_heads=heads, weights=tuple(weights))


def make_vector_transfer(
    source: VectorSource, student: PreTrainedConfig, pairs: LayerPairs, weights: Sequence[float], *, seed: int
) -> tuple[VectorTransfer, nn.ModuleDict]:
    """`direct` of these pairs, all of which the cache holds, and its linear maps.

    Args:
        source: the cache; some of its rows are read, for the variance of the vectors.
        student: the student's configuration.
        pairs: see `attention_pairs`.
        weights: of queries, keys and values.
        seed: of maps between different widths.

    Raises:
        TargetsError: the cache holds relations as matrices.
    """
    manifest = source.manifest
    for _, layer in pairs:
        if _spec(manifest, layer).form == "matrix":
            raise TargetsError(
                f"--method direct learns queries, keys and values, and the cache holds attention {layer} as matrices "
                "of their relations: vectors cannot be had from those; use --method mha, or build a cache with "
                "--relations hidden or qkv"
            )
    layers = tuple(sorted({layer for _, layer in pairs}))
    spreads = measure_spreads(source, layers)
    generator = torch.Generator().manual_seed(seed)
    maps = {
        _map_name(name, *pair): make_map(student_width, spreads[pair[1]].widths[index], generator)
        for pair in pairs
        for index, (name, student_width) in enumerate(zip(VECTORS, _vector_widths(student), strict=True))
        if weights[index]
    }
    variances = {layer: spread.variances for layer, spread in spreads.items()}
    method = VectorTransfer(pairs=pairs, views=_views(manifest, pairs), variances=variances, weights=tuple(weights))
    return method, nn.ModuleDict(maps)


@dataclass(frozen=True, kw_only=True)
class VectorSpreads:
    """Of queries, keys and values of one layer: widths, and E||x - mean||^2."""

    widths: tuple[int, ...]
    variances: tuple[float, ...]


def measure_spreads(source: VectorSource, layers: Sequence[int]) -> dict[int, VectorSpreads]:
    """Widths and variances of the vectors of these layers, over real positions of the first rows of the cache.

    A cache holds the variance of hidden states, not of what is computed from them.
    """
    rows = min(VARIANCE_ROWS, source.manifest.rows)
    batch = source.read_rows(0, rows, TargetRequest(attention_layers=tuple(layers)))
    spreads = {}
    for layer in layers:
        targets = batch[_spec(source.manifest, layer).view]
        vectors = [getattr(targets.attention[layer], f"{name}_BTD")[targets.real_BT()] for name in VECTORS]
        spreads[layer] = VectorSpreads(
            widths=tuple(each.shape[1] for each in vectors), variances=tuple(map(_variance, vectors))
        )
    return spreads


def _vector_widths(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Widths of queries, keys and values; where queries share keys and values, those are narrower."""
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    return heads * head_width, shared, shared


def _variance(vectors_PD: Tensor) -> float:
    vectors_PD = vectors_PD.double()
    variance = float((vectors_PD - vectors_PD.mean(0)).square().sum(1).mean())
    # a constant is matched by the bias alone; 1 leaves its error as it is
    return variance if variance > torch.finfo(torch.float32).tiny else 1.0


def _map_name(vector: str, student_layer: int, teacher_layer: int) -> str:
    return f"{projection_name(student_layer, teacher_layer)}_{vector}"


def _spec(manifest: Manifest, layer: int) -> Any:
    spec = manifest.targets.find_attention(layer)
    assert spec is not None
    return spec


def _views(manifest: Manifest, pairs: LayerPairs) -> dict[int, View]:
    return {layer: _spec(manifest, layer).view for _, layer in pairs}


def _request(pairs: LayerPairs) -> TargetRequest:
    return TargetRequest(attention_layers=tuple(sorted({layer for _, layer in pairs})))


def _needs(pairs: LayerPairs, views: Mapping[int, View], view: View) -> StudentNeeds:
    return StudentNeeds(attention_layers=frozenset(student for student, teacher in pairs if views[teacher] == view))


def _describe(pairs: LayerPairs, weights: Sequence[float], views: Mapping[int, View]) -> dict[str, Any]:
    return {
        "pairs": [list(pair) for pair in pairs],
        "weights": list(weights),
        "view": "+".join(sorted(set(views.values()))),
    }


def _cached_layer(manifest: Manifest) -> int:
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


def _check_stored_heads(stored: int, *, asked: int | None, student_width: int) -> int:
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
    return stored
