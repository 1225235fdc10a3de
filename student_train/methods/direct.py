"""`direct`: queries, keys and values of teacher layers through one learned linear map each (DirectMiniLM).

In: the pairs of layers asked for and what the cache holds, then what the student computed and the decoded targets of
the same rows. Out: one `LossSum` per batch, the sum over the pairs. It needs vectors, so a cache of matrices of
relations does not serve it. Its maps train along and are not exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from student_train.data.first_rows import FirstRows
from student_train.layer_map import LayerPairs
from student_train.losses.relations import vectors_loss
from student_train.losses.sums import LossSum, add_losses
from student_train.methods.attention_pairs import describe_pairs, needs_of, request_of, spec_of, views_of_pairs
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from student_train.methods.projections import make_map, projection_name
from student_train.methods.relation_heads import vector_widths
from teacher_cache.contract.batch import AttentionVectors, Batch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import View
from teacher_cache.errors import TargetsError
from teacher_cache.read.pool import CacheSource

VARIANCE_ROWS = 64
"""Rows of the cache, the first ones, that the variance of attention vectors is measured on."""


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
        return request_of(self.pairs)

    def needs(self, view: View) -> StudentNeeds:
        return needs_of(self.pairs, self.views, view)

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
                    ordinary_BT=batch[view].ordinary_attention_BT(teacher_layer),
                )
            )
        return add_losses(losses)

    def mapped(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """See `MapsVectors`."""
        for student_layer, teacher_layer in self.pairs:
            targets, given = batch[self.views[teacher_layer]], outputs[self.views[teacher_layer]]
            counted_BT = targets.ordinary_attention_BT(teacher_layer)
            both = (given.attention[student_layer], targets.attention[teacher_layer])
            for name in self._learned():
                student_ND, teacher_ND = (getattr(each, f"{name}_BTD")[counted_BT] for each in both)
                yield _map_name(name, student_layer, teacher_layer), student_ND, teacher_ND

    def _learned(self) -> tuple[str, ...]:
        return tuple(name for name, weight in zip(VECTORS, self.weights, strict=True) if weight)

    def describe(self) -> dict[str, Any]:
        return describe_pairs(self.pairs, self.weights, self.views)


def make_vector_transfer(
    source: CacheSource,
    student: PreTrainedConfig,
    pairs: LayerPairs,
    weights: Sequence[float],
    *,
    seed: int,
    skip_damaged: bool = False,
) -> tuple[VectorTransfer, nn.ModuleDict]:
    """`direct` of these pairs, all of which the cache holds, and its linear maps.

    Args:
        source: the cache, after `check_vectors`; some of its rows are read, for the variance of the vectors.
        student: the student's configuration.
        pairs: see `attention_pairs`.
        weights: of queries, keys and values.
        seed: of maps between different widths.
        skip_damaged: whether rows of damaged blocks are passed over.

    Raises:
        DamagedStoreError: a row that is read is of a damaged block.
    """
    layers = tuple(sorted({layer for _, layer in pairs}))
    spreads = measure_spreads(source, layers, skip_damaged=skip_damaged)
    generator = torch.Generator().manual_seed(seed)
    maps = {
        _map_name(name, *pair): make_map(student_width, spreads[pair[1]].widths[index], generator)
        for pair in pairs
        for index, (name, student_width) in enumerate(zip(VECTORS, vector_widths(student), strict=True))
        if weights[index]
    }
    variances = {layer: spread.variances for layer, spread in spreads.items()}
    method = VectorTransfer(
        pairs=pairs, views=views_of_pairs(source.manifest, pairs), variances=variances, weights=tuple(weights)
    )
    return method, nn.ModuleDict(maps)


def check_vectors(manifest: Manifest, pairs: LayerPairs) -> None:
    """Check that the cache, which holds these pairs, holds their queries, keys and values themselves.

    Raises:
        TargetsError: it holds relations as matrices.
    """
    for _, layer in pairs:
        if spec_of(manifest, layer).form == "matrix":
            raise TargetsError(
                f"--method direct learns queries, keys and values, and the cache holds attention {layer} as matrices "
                "of their relations: vectors cannot be had from those; use --method mha, or build a cache with "
                "--relations hidden or qkv"
            )


@dataclass(frozen=True, kw_only=True)
class VectorSpreads:
    """Of queries, keys and values of one layer: widths, and E||x - mean||^2."""

    widths: tuple[int, ...]
    variances: tuple[float, ...]


def measure_spreads(
    source: CacheSource, layers: Sequence[int], *, skip_damaged: bool = False
) -> dict[int, VectorSpreads]:
    """Widths and variances of the vectors of these layers, over ordinary positions of the first rows of the cache.

    A cache holds the variance of hidden states, not of what is computed from them.
    """
    request, count = TargetRequest(attention_layers=tuple(layers)), min(VARIANCE_ROWS, source.manifest.rows)
    if skip_damaged:
        rows = (range(source.manifest.rows),)
        batch = FirstRows(source=source, rows=rows, skip_damaged=True).read(request, count)
    else:
        batch = source.read_rows(0, count, request)
    spreads = {}
    for layer in layers:
        targets = batch[spec_of(source.manifest, layer).view]
        counted_BT = targets.ordinary_attention_BT(layer)
        vectors = [getattr(targets.attention[layer], f"{name}_BTD")[counted_BT] for name in VECTORS]
        spreads[layer] = VectorSpreads(
            widths=tuple(each.shape[1] for each in vectors), variances=tuple(map(_variance, vectors))
        )
    return spreads


def _variance(vectors_PD: Tensor) -> float:
    vectors_PD = vectors_PD.double()
    variance = float((vectors_PD - vectors_PD.mean(0)).square().sum(1).mean())
    # a constant is matched by the bias alone; 1 leaves its error as it is
    return variance if variance > torch.finfo(torch.float32).tiny else 1.0


def _map_name(vector: str, student_layer: int, teacher_layer: int) -> str:
    return f"{projection_name(student_layer, teacher_layer)}_{vector}"
