"""The methods that learn hidden states: `hs`, one class for each form of `--mapping`.

In: a `LayerMapping` and the cache's constants, then what the student computed and the decoded targets of the same rows.
Out: one `LossSum` per batch. Memory beside the student's own: one teacher-wide float32 state of the pass per pair, or
per student layer with `emd` and `alp`; none of them grows with student layers times teacher layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from student_train.layer_map import LayerMapping
from student_train.losses.hidden import (
    attended_state_loss,
    deviation,
    first_token_loss,
    hidden_state_loss,
    transport_costs,
    transported_state_loss,
)
from student_train.losses.sums import LossSum, add_losses
from student_train.methods.base import Counted, Method, StudentNeeds, StudentOutputs
from student_train.methods.projections import FloatLinear, make_projections, projection_name, projection_starts
from student_train.methods.transport import LayerTransport
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import View
from teacher_cache.errors import TargetsError
from teacher_cache.read.pool import CacheSource


@dataclass(frozen=True, kw_only=True)
class HiddenTransfer:
    """`hs` with given pairs: hidden states of mapped layers through one learned linear map per pair.

    The maps give the coordinates in which the cache holds a layer, those of `rotated_layers` being principal
    components: distances are the same, and decoding needs no inverse rotation.
    """

    mapping: LayerMapping
    views: Mapping[int, View]
    variance: Mapping[int, float]
    rotated_layers: tuple[int, ...]
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(hidden_layers=self.mapping.teacher_layers, rotated_layers=self.rotated_layers)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset(i for i, j in self.mapping.pairs if self.views[j] == view))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.mapping.pairs:
            view = self.views[teacher_layer]
            losses.append(
                hidden_state_loss(
                    outputs[view].hidden[student_layer],
                    batch[view].hidden[teacher_layer],
                    batch[view].real_BT(),
                    projections[projection_name(student_layer, teacher_layer)],
                    self.variance[teacher_layer],
                    batch[view].ordinary_BT(teacher_layer),
                )
            )
        return add_losses(losses)

    def mapped(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """See `MapsVectors`."""
        for student_layer, teacher_layer in self.mapping.pairs:
            targets, given = batch[self.views[teacher_layer]], outputs[self.views[teacher_layer]]
            counted_BT, name = targets.ordinary_BT(teacher_layer), projection_name(student_layer, teacher_layer)
            yield name, given.hidden[student_layer][counted_BT], targets.hidden[teacher_layer][counted_BT]

    def describe(self) -> dict[str, Any]:
        return {"mapping": self.mapping.text, "pairs": [list(pair) for pair in self.mapping.pairs]}


@dataclass(frozen=True, kw_only=True)
class FirstTokenTransfer:
    """`hs` with `skip`: directions of the first token's hidden states, through learned maps if the widths differ."""

    mapping: LayerMapping
    views: Mapping[int, View]
    counted: Counted = "rows"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(hidden_layers=self.mapping.teacher_layers)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset(i for i, j in self.mapping.pairs if self.views[j] == view))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        losses = []
        for student_layer, teacher_layer in self.mapping.pairs:
            view, name = self.views[teacher_layer], projection_name(student_layer, teacher_layer)
            student_BTD, teacher_BTD = outputs[view].hidden[student_layer], batch[view].hidden[teacher_layer]
            projection = projections[name] if name in projections else None  # noqa: SIM401 - a ModuleDict has no get
            losses.append(first_token_loss(student_BTD, teacher_BTD, projection))
        return add_losses(losses)

    def describe(self) -> dict[str, Any]:
        return {
            "mapping": self.mapping.text,
            "pairs": [list(pair) for pair in self.mapping.pairs],
            "of": "first token",
        }


@dataclass(frozen=True, kw_only=True)
class TransportTransfer:
    """`hs` with `emd`: every student layer learns from all teacher layers, in the proportions of a flow.

    The flow is that of the step before, see `transport`; passes report what the next one is computed from.
    """

    mapping: LayerMapping
    view: View
    deviations: tuple[float, ...]
    transport: LayerTransport
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(hidden_layers=self.mapping.teacher_layers)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset(self.mapping.student_layers if view == self.view else ()))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        real_BT, hidden = _ordinary_in_all(batch[self.view], self.mapping), outputs[self.view].hidden
        mapped = [projections[projection_name(layer)](hidden[layer]) for layer in self.mapping.student_layers]
        taught = [batch[self.view].hidden[layer] for layer in self.mapping.teacher_layers]
        costs_SL = transport_costs(mapped, taught, real_BT, self.deviations)
        self.transport.observe(costs_SL, real_BT.sum())
        flow = self.transport.flow.tolist()
        total = transported_state_loss(mapped, taught, real_BT, self.deviations, flow, costs_SL).total
        return LossSum(total, batch[self.view].length_B.sum())

    def describe(self) -> dict[str, Any]:
        return _describe_all(self.mapping)


@dataclass(frozen=True, kw_only=True)
class AttentionOverLayers:
    """`hs` with `alp`: every student layer learns the mean of all teacher layers, weighted by its own attention."""

    mapping: LayerMapping
    view: View
    deviations: tuple[float, ...]
    counted: Counted = "positions"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(hidden_layers=self.mapping.teacher_layers)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset(self.mapping.student_layers if view == self.view else ()))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        real_BT, hidden = _ordinary_in_all(batch[self.view], self.mapping), outputs[self.view].hidden
        taught = [batch[self.view].hidden[layer] for layer in self.mapping.teacher_layers]
        losses = []
        for layer in self.mapping.student_layers:
            projection = projections[projection_name(layer)]
            losses.append(attended_state_loss(hidden[layer], taught, real_BT, projection, self.deviations))
        return LossSum(add_losses(losses).total, batch[self.view].length_B.sum())

    def describe(self) -> dict[str, Any]:
        return _describe_all(self.mapping)


def _ordinary_in_all(targets: TargetBatch, mapping: LayerMapping) -> Tensor:
    """True at the real positions that are sinks of no teacher layer.

    What is no such position adds nothing and is counted all the same, as with given pairs: a global batch counts
    positions before any layer is looked at.
    """
    counted_BT = targets.real_BT()
    for layer in mapping.teacher_layers:
        counted_BT = counted_BT & targets.ordinary_BT(layer)
    return counted_BT


def make_hidden_transfer(
    source: CacheSource, mapping: LayerMapping, *, student_width: int, seed: int, unrotated: Collection[int] = ()
) -> tuple[Method, nn.ModuleDict]:
    """The method that learns hidden states by this mapping, and its linear maps.

    Args:
        source: a cache that holds the layers of the mapping, after `check_views`.
        mapping: what learns from what.
        student_width: the student's hidden width.
        seed: of maps between different widths.
        unrotated: layers to be read as the teacher gave them, since another method reads them so.
    """
    layers, width = mapping.teacher_layers, source.manifest.teacher.hidden_size
    variance = {layer: source.hidden_variance(layer) for layer in layers}
    deviations = {layer: deviation(variance[layer], width) for layer in layers}
    starts = projection_starts(mapping, student_width, width, deviations)
    views = _views_of_layers(source.manifest, mapping)
    maps = make_projections(starts, student_width, width, seed)
    method: Method
    if mapping.form == "pairs":
        found = {layer: source.rotation(layer) for layer in layers if layer not in unrotated}
        rotations = {layer: rotation for layer, rotation in found.items() if rotation is not None}
        for pair in mapping.pairs:
            if (rotation := rotations.get(pair[1])) is not None:
                linear = maps.get_submodule(projection_name(*pair))
                assert isinstance(linear, FloatLinear)
                linear.rotation = rotation
        method = HiddenTransfer(mapping=mapping, views=views, variance=variance, rotated_layers=tuple(rotations))
    elif mapping.form == "skip":
        method = FirstTokenTransfer(mapping=mapping, views=views)
    elif mapping.form == "alp":
        method = AttentionOverLayers(mapping=mapping, view=views[layers[0]], deviations=tuple(deviations.values()))
    else:
        transport = LayerTransport(len(mapping.student_layers), len(layers))
        method = TransportTransfer(
            mapping=mapping, view=views[layers[0]], deviations=tuple(deviations.values()), transport=transport
        )
    return method, maps


def check_views(manifest: Manifest, mapping: LayerMapping) -> None:
    """Check that a mapping that weighs all layers finds them of one view in a cache, which holds them.

    Raises:
        TargetsError: the cache holds them of different inputs.
    """
    views = _views_of_layers(manifest, mapping)
    if mapping.weighs_all and len(set(views.values())) > 1:
        by_view = {view: [layer for layer in views if views[layer] == view] for view in sorted(set(views.values()))}
        held = " and ".join(f"{view} for {', '.join(map(str, layers))}" for view, layers in by_view.items())
        raise TargetsError(
            f"--mapping {mapping.text!r} compares all teacher layers of one input, and the cache holds hidden states "
            f"of different ones ({held}): build a cache with --layers all and one --hs-view"
        )


def _views_of_layers(manifest: Manifest, mapping: LayerMapping) -> dict[int, View]:
    return {spec.layer: spec.view for spec in manifest.targets.hidden if spec.layer in mapping.teacher_layers}


def _describe_all(mapping: LayerMapping) -> dict[str, Any]:
    return {
        "mapping": mapping.text,
        "student_layers": list(mapping.student_layers),
        "teacher_layers": list(mapping.teacher_layers),
    }
