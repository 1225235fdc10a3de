"""What a student is trained on: the methods asked for with their weights, layers, heads and trainable projections.

In: settings, the cache's manifest and the student's configuration. Out: an `Objective`, which names the targets it
needs and gives one `LossSum` per method on a batch. Anything that does not fit the cache or the student is refused by
`plan_objective`, before a row is read. The weighting of the methods and the division by the global batch are the
trainer's; the projections train along and never reach the exported student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from student_train.layer_map import LayerMapping, LayerPairs, parse_mapping
from student_train.losses.sums import LossSum
from student_train.methods.additions import MethodContext, make_added_method
from student_train.methods.attention_pairs import attention_pairs
from student_train.methods.base import Method, StudentNeeds, StudentOutputs
from student_train.methods.direct import check_vectors, make_vector_transfer
from student_train.methods.hs import TransportTransfer, check_views, make_hidden_transfer
from student_train.methods.mha import make_attention_transfer
from student_train.methods.od import (
    LogitsMethod,
    TopkLoss,
    logits_losses,
    make_distribution_transfer,
    make_next_token_prediction,
    make_token_prediction,
)
from student_train.methods.relation_heads import RelationFlags, RelationMask
from student_train.settings import METHODS, READING_ATTENTION
from teacher_cache.contract.batch import Batch, TargetRequest
from teacher_cache.contract.targets import View
from teacher_cache.errors import SettingsError, TargetsError
from teacher_cache.read.pool import CacheSource


class Objective(nn.Module):
    """The methods by name, in order, with their weights and their trainable projections."""

    def __init__(
        self,
        methods: Mapping[str, Method | LogitsMethod],
        weights: Mapping[str, float],
        projections: Mapping[str, nn.ModuleDict],
    ) -> None:
        super().__init__()
        self.methods = dict(methods)
        self.weights = dict(weights)
        self.projections = nn.ModuleDict({name: projections.get(name, nn.ModuleDict()) for name in methods})
        adapting = {name: method.transport for name, method in methods.items() if isinstance(method, TransportTransfer)}
        self.adapting = nn.ModuleDict(adapting)

    @property
    def request(self) -> TargetRequest:
        """Every target that some method reads."""
        return unite(method.request for method in self.methods.values())

    def needs(self, view: View) -> StudentNeeds:
        """What the student's forward pass on `view` must give."""
        needs = StudentNeeds()
        for method in self.methods.values():
            needs = needs | method.needs(view)
        return needs

    def forward(self, outputs: Mapping[View, StudentOutputs], batch: Batch) -> dict[str, LossSum]:
        """The loss of every method on these rows, unweighted; to be minimised in the proportion of the weights."""
        reading_logits = {name: method for name, method in self.methods.items() if isinstance(method, LogitsMethod)}
        losses = logits_losses(reading_logits, self.weights, outputs, batch)
        for name, method in self.methods.items():
            if not isinstance(method, LogitsMethod):
                projections = self.projections[name]
                assert isinstance(projections, nn.ModuleDict)
                losses[name] = method.loss(outputs, batch, projections)
        return {name: losses[name] for name in self.methods}

    def finish_step(self) -> None:
        """Let methods that adapt while training do so, from what they saw since the last call; after every update."""
        for part in self.adapting.values():
            part.finish_step()  # type: ignore[operator]

    def describe(self) -> dict[str, Any]:
        """For the provenance record: each method's layers and settings."""
        return {name: method.describe() for name, method in self.methods.items()}

    def adaptation(self) -> dict[str, Any]:
        """What a checkpoint has to keep of methods that adapt, by method."""
        return {name: part.state() for name, part in self.adapting.items()}  # type: ignore[operator]

    def restore_adaptation(self, adaptation: Mapping[str, Any]) -> None:
        """Go back to what `adaptation` returned."""
        for name, part in self.adapting.items():
            part.restore(adaptation[name])  # type: ignore[operator]

    def adapted(self) -> dict[str, Any]:
        """For the provenance record: what methods that adapt have come to, by method; empty if none does."""
        return {name: part.describe() for name, part in self.adapting.items()}  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class ObjectivePlan:
    """The methods of this package that are asked for, checked against cache and student.

    Those that read nothing but the manifest are `made`.
    """

    made: Mapping[str, Method | LogitsMethod]
    attention: LayerPairs
    mapping: LayerMapping | None


def plan_objective(
    weights: Mapping[str, float],
    *,
    source: CacheSource,
    student: PreTrainedConfig,
    mapping: str = "uniform+last",
    attention_layer: str | None = None,
    relation_heads: int | None = None,
    relation_heads_kv: int | None = None,
    relation_mask: RelationMask | None = None,
    relation_weights: Sequence[float] = (1.0, 1.0, 1.0),
    topk_loss: TopkLoss = "tail",
    trimmed: bool = False,
    beside: Sequence[TargetRequest] = (),
) -> ObjectivePlan:
    """What `make_objective` is going to make. Asks the manifest alone: no row is read and no map is made.

    Args: those of `make_objective`, and
        beside: what methods that other packages add read. They are not made here, and it is known once they are.

    Raises:
        SettingsError: heads, layers or a vocabulary that do not fit.
        TargetsError: the cache lacks what the methods read.
    """
    manifest = source.manifest
    pairs: LayerPairs = ()
    if not set(READING_ATTENTION).isdisjoint(weights):
        pairs = attention_pairs(manifest, student, attention_layer)
    layer_map = parse_mapping(mapping, manifest.teacher.layers, student.num_hidden_layers) if "hs" in weights else None
    # of all methods at once: whoever has to build another store should learn everything that it must hold
    request = TargetRequest(
        hidden_layers=layer_map.teacher_layers if layer_map else (),
        attention_layers=tuple(sorted({teacher_layer for _, teacher_layer in pairs})),
        logits="od" in weights,
        masked="mlm" in weights,
        next_tokens="lm" in weights,
    )
    _require(source, unite([request, *beside]), layer_map)
    made: dict[str, Method | LogitsMethod] = {}
    for name in weights:
        if name == "mha":
            asked = RelationFlags(heads=relation_heads, key_value_heads=relation_heads_kv, mask=relation_mask)
            made[name] = make_attention_transfer(manifest, student, pairs, asked, relation_weights)
        elif name == "direct":
            check_vectors(manifest, pairs)
        elif name == "hs" and layer_map is not None:
            check_views(manifest, layer_map)
        elif name == "od":
            made[name] = make_distribution_transfer(manifest, student, topk_loss, trimmed=trimmed)
        elif name == "mlm":
            made[name] = make_token_prediction(manifest, student, trimmed=trimmed)
        elif name == "lm":
            made[name] = make_next_token_prediction(manifest, student)
    return ObjectivePlan(made=made, attention=pairs, mapping=layer_map)


def unite(requests: Iterable[TargetRequest]) -> TargetRequest:
    """Everything that some of the requests ask for."""
    all_of_them = tuple(requests)
    return TargetRequest(
        hidden_layers=tuple(sorted({layer for request in all_of_them for layer in request.hidden_layers})),
        rotated_layers=tuple(sorted({layer for request in all_of_them for layer in request.rotated_layers})),
        attention_layers=tuple(sorted({layer for request in all_of_them for layer in request.attention_layers})),
        logits=any(request.logits for request in all_of_them),
        masked=any(request.masked for request in all_of_them),
        next_tokens=any(request.next_tokens for request in all_of_them),
    )


def make_objective(
    weights: Mapping[str, float],
    *,
    source: CacheSource,
    student: PreTrainedConfig,
    mapping: str = "uniform+last",
    attention_layer: str | None = None,
    relation_heads: int | None = None,
    relation_heads_kv: int | None = None,
    relation_mask: RelationMask | None = None,
    relation_weights: Sequence[float] = (1.0, 1.0, 1.0),
    topk_loss: TopkLoss = "tail",
    trimmed: bool = False,
    seed: int = 0,
    skip_damaged: bool = False,
) -> Objective:
    """The objective of the methods that `weights` names, in its order, for this student on this cache.

    Args:
        weights: weight of each method: `mha`, `direct`, `hs`, `od`, `mlm`, and those that other packages add.
        source: the cache; asked for its manifest, whether it holds the targets, the variance of hidden states, and for
            `direct` for some rows, once everything is checked.
        student: the student's configuration.
        mapping: layers of `hs`, see `read_mapping`.
        attention_layer: layers of `mha` and `direct`, see `attention_pairs`; None for the teacher's last but one, or
            what the cache has where it lacks that.
        relation_heads: heads of `mha`; None for the largest common divisor of both widths up to teacher width / 16.
        relation_heads_kv: those of keys and values, where their widths differ from the queries'.
        relation_mask: what `mha` relates a position to; None for what such a teacher sees.
        relation_weights: of queries, keys and values, in `mha` and `direct`.
        topk_loss: what `od` does with the mass outside the kept ids, see `TopkTargets` and `KeptTargets`.
        trimmed: whether `source` gives ids of the student's own, and its number of entries for those that it has not
            got.
        seed: of projections between different widths.
        skip_damaged: whether `direct` passes over rows of damaged blocks.

    Raises:
        DamagedStoreError: a row that `direct` reads is of a damaged block.
        SettingsError: heads, layers or a vocabulary that do not fit.
        TargetsError: the cache lacks what the methods read.
    """
    context = MethodContext(
        source=source,
        student=student,
        mapping=mapping,
        attention_layer=attention_layer,
        relation_heads=relation_heads,
        relation_heads_kv=relation_heads_kv,
        relation_mask=relation_mask,
        relation_weights=tuple(relation_weights),
        topk_loss=topk_loss,
        seed=seed,
    )
    added = {name: make_added_method(name, context) for name in weights if name not in METHODS}
    added_requests = [method.request for method, _ in added.values()]
    plan = plan_objective(
        weights,
        source=source,
        student=student,
        mapping=mapping,
        attention_layer=attention_layer,
        relation_heads=relation_heads,
        relation_heads_kv=relation_heads_kv,
        relation_mask=relation_mask,
        relation_weights=relation_weights,
        topk_loss=topk_loss,
        trimmed=trimmed,
        beside=added_requests,
    )
    as_they_are = {layer for request in added_requests for layer in _read_as_they_are(request)}
    made: dict[str, tuple[Method | LogitsMethod, nn.ModuleDict]] = {}
    for name in weights:
        if name in added:
            made[name] = added[name]
        elif name in plan.made:
            made[name] = plan.made[name], nn.ModuleDict()
        elif name == "direct":
            made[name] = make_vector_transfer(
                source, student, plan.attention, relation_weights, seed=seed, skip_damaged=skip_damaged
            )
        else:
            assert plan.mapping is not None
            made[name] = make_hidden_transfer(
                source, plan.mapping, student_width=student.hidden_size, seed=seed, unrotated=as_they_are
            )
    methods = {name: method for name, (method, _) in made.items()}
    _check_coordinates(methods)
    return Objective(methods, weights, {name: maps for name, (_, maps) in made.items()})


def _read_as_they_are(request: TargetRequest) -> set[int]:
    """Layers whose hidden states are read as the teacher gave them, not in the coordinates of the cache."""
    return set(request.hidden_layers) - set(request.rotated_layers)


def _check_coordinates(methods: Mapping[str, Method | LogitsMethod]) -> None:
    """A batch has each hidden state once, so the methods that read it must read it in the same coordinates.

    Raises:
        SettingsError: they do not.
    """
    for name, method in methods.items():
        for other_name, other in methods.items():
            differing = set(method.request.rotated_layers) & _read_as_they_are(other.request)
            if differing:
                raise SettingsError(
                    f"--method {name} reads hidden state {min(differing)} in the coordinates of the cache and "
                    f"{other_name} reads it as the teacher gave it: a batch has it in one form; leave the layer out of "
                    f"`rotated_layers` in the request of {name}"
                )


def _require(source: CacheSource, request: TargetRequest, layer_map: LayerMapping | None) -> None:
    """Check that the cache holds all of it, and say why where a mapping reads every layer."""
    try:
        source.require(request)
    except TargetsError as error:
        held = source.manifest.targets.hidden_layers()
        if layer_map is None or not layer_map.weighs_all or set(request.hidden_layers) <= set(held):
            raise
        raise TargetsError(
            f"{error}. --mapping {layer_map.text!r} compares each student layer with every teacher layer, "
            f"1 to {request.hidden_layers[-1]}: `--layers all` names them"
        ) from error
