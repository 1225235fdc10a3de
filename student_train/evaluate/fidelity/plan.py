"""What to compare: which layers, relation heads and rows, given what the cache holds and the student's own record.

A student of `kdtrain` is measured at the layers and heads it was trained on, on the rows that its training held out.
For whatever it was not trained on, and for students from elsewhere, the defaults of `kdtrain` stand in, cut to what the
cache holds. Pure decisions, nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student_train.data.split import RowRanges, count_rows, share_out, split_rows
from student_train.evaluate.fidelity.own_record import (
    expected_count,
    held_out_by_store,
    layer_pairs_of,
    own_record_problem,
)
from student_train.layer_map import LayerPairs, parse_mapping
from student_train.methods.relation_heads import Widths, default_heads, taught_widths
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import LogitsSpec, View

DEFAULT_MAPPING = "uniform+last"


@dataclass(frozen=True, kw_only=True)
class RelationPair:
    """Attention relations of one student layer against one teacher layer, in `heads` relation heads.

    `key_value_heads` are those of keys and values, where they are not as many. `causal`: each position is related to
    itself and those before it.
    """

    student_layer: int
    teacher_layer: int
    heads: int
    view: View
    key_value_heads: int | None = None
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class HiddenPair:
    """Hidden state of one student layer against that of one teacher layer."""

    student_layer: int
    teacher_layer: int
    view: View


@dataclass(frozen=True, kw_only=True)
class FidelityPlan:
    """Everything that one measurement compares. `notes` say what was left out and why, for the reader of the report.

    `exact`: the output distribution is compared with that of the teacher itself, which runs beside the student.
    Otherwise `logits` says what the cache keeps of it.
    """

    rows: RowRanges
    held_out: bool
    relations: tuple[RelationPair, ...]
    hidden: tuple[HiddenPair, ...]
    logits_view: View | None
    notes: tuple[str, ...]
    exact: bool = False
    logits: LogitsSpec | None = None

    @property
    def request(self) -> TargetRequest:
        """The targets to read."""
        return TargetRequest(
            hidden_layers=tuple(sorted({pair.teacher_layer for pair in self.hidden})),
            attention_layers=tuple(sorted({pair.teacher_layer for pair in self.relations})),
            logits=self.logits_view is not None and not self.exact,
            masked=self.logits_view == "masked" and self.exact,
            next_tokens=self.logits_view == "plain" and self.exact,
        )


def plan_fidelity(
    manifest: Manifest,
    *,
    stores: Sequence[tuple[str, int]],
    student_layers: int,
    student_width: int,
    has_head: bool,
    provenance: Mapping[str, Any],
    rows: int | None = None,
    exact: bool = False,
    vector_widths: Widths | None = None,
) -> FidelityPlan:
    """What to measure of a student of this shape on this cache.

    Args:
        manifest: what the cache holds.
        stores: hash of the contents and number of rows of each store of the cache, compared with the provenance.
        student_layers: the student's depth.
        student_width: the student's hidden width.
        has_head: whether the student has a trained language-modelling head.
        provenance: the record that `kdtrain` left with the student, or nothing.
        rows: at most so many of the held-out rows, the last ones.
        exact: whether the output distribution is to be compared with that of the teacher itself.
        vector_widths: of the student's queries, keys and values; its hidden width if not given.
    """
    own_widths = vector_widths or (student_width, student_width, student_width)
    notes: list[str] = []
    cached = manifest.targets.attention_layers()
    taught = taught_widths(manifest, cached) if cached else None
    problem = own_record_problem(provenance, taught or own_widths, student_layers, own_widths)
    if problem is not None:
        notes.append(
            f"the student's provenance.json is no record of kdtrain for it ({problem}): measured at default layers and "
            "on default rows"
        )
        provenance = {}
    objective: Mapping[str, Any] = provenance.get("objective", {})
    measured_rows, held_out = _rows(stores, provenance, rows, notes)
    return FidelityPlan(
        rows=measured_rows,
        held_out=held_out,
        relations=_relations(manifest, objective.get("mha"), student_layers, own_widths, notes),
        hidden=_hidden(manifest, objective.get("hs"), student_layers, count_rows(measured_rows), notes),
        logits_view=_exact_view(manifest, has_head, notes) if exact else _logits_view(manifest, has_head, notes),
        exact=exact,
        logits=manifest.targets.logits,
        notes=tuple(notes),
    )


def _rows(
    stores: Sequence[tuple[str, int]], provenance: Mapping[str, Any], limit: int | None, notes: list[str]
) -> tuple[RowRanges, bool]:
    """The last rows of each store: those that the training held out, or as many as it would by default."""
    sizes = [rows for _, rows in stores]
    kept = held_out_by_store(provenance)
    trained_on = all(identity in kept for identity, _ in stores)
    counts = tuple(min(kept.get(identity, 0), rows) for identity, rows in stores)
    known = trained_on and any(counts)
    if not known:
        count = expected_count(provenance, sum(sizes))
        counts = share_out(count, sizes)
        if trained_on:
            notes.append(f"the student's training held out no row of this store: it has seen the {count} measured")
        elif provenance:
            path = provenance.get("cache", {}).get("path")
            notes.append(
                f"the student was trained from a store with other contents ({path!r}): the last {count} rows of this "
                "one are held out only if both hold the same rows"
            )
    measured = share_out(min(sum(counts), limit or sum(counts)), counts)
    return split_rows(sizes, measured)[1], known


def _relations(
    manifest: Manifest, trained: Mapping[str, Any] | None, layers: int, widths: Widths, notes: list[str]
) -> tuple[RelationPair, ...]:
    cached, causal = manifest.targets.attention_layers(), manifest.teacher.causal
    heads, others = default_heads(taught_widths(manifest, cached), widths) if cached else (1, 1)
    wanted = [(layers, layer) for layer in cached]
    trained_pairs = layer_pairs_of(trained)
    known = [(student, teacher) for student, teacher in trained_pairs if teacher in cached]
    if trained is not None and known:
        wanted, heads = known, trained["relation_heads"]
        others, causal = trained.get("key_value_heads", heads), trained.get("relation_mask") == "causal"
    elif not cached:
        notes.append("no relation KL: the cache holds no attention targets")
    missing = sorted({teacher for _, teacher in trained_pairs} - set(cached))
    if missing:
        notes.append(f"attention of teacher layers trained on, {', '.join(map(str, missing))}, is not in this cache")
    found = []
    for student_layer, teacher_layer in wanted:
        spec = manifest.targets.find_attention(teacher_layer)
        assert spec is not None
        fixed, undivided = spec.heads or heads, [width for width in widths if spec.heads and width % spec.heads]
        if undivided:
            notes.append(
                f"no relation KL at teacher layer {spec.layer}: the cache holds matrices of {fixed} relation heads, "
                f"which do not divide the student's width {undivided[0]}"
            )
            continue
        if fixed != heads:
            notes.append(f"relations are measured in the {fixed} heads that the cache holds, not in {heads}")
        found.append(
            RelationPair(
                student_layer=student_layer,
                teacher_layer=spec.layer,
                heads=fixed,
                view=spec.view,
                key_value_heads=None if spec.heads or others == heads else others,
                causal=causal,
            )
        )
    return tuple(found)


def _hidden(
    manifest: Manifest, trained: Mapping[str, Any] | None, layers: int, rows: int, notes: list[str]
) -> tuple[HiddenPair, ...]:
    views = {spec.layer: spec.view for spec in manifest.targets.hidden}
    if not views:
        notes.append("no hidden NMSE: the cache holds no hidden states")
        return ()
    if rows < 2:
        notes.append("no hidden NMSE: it takes two rows, one to fit the linear map on and one to measure it on")
        return ()
    pairs = layer_pairs_of(trained)
    if not pairs:
        pairs = _default_pairs(manifest, layers)
        if trained is not None:
            notes.append(
                f"the student was trained with mapping {trained.get('mapping')!r}, which weighs all pairs of layers: "
                f"hidden states are compared as with {DEFAULT_MAPPING}"
            )
    missing = sorted({teacher for _, teacher in pairs if teacher not in views})
    if missing:
        notes.append(f"hidden states of teacher layers {', '.join(map(str, missing))} are not in this cache")
    usable = [pair for pair in pairs if pair[1] in views] or [(layers, teacher) for teacher in sorted(views)]
    return tuple(
        HiddenPair(student_layer=student, teacher_layer=teacher, view=views[teacher]) for student, teacher in usable
    )


def _default_pairs(manifest: Manifest, layers: int) -> LayerPairs:
    """The default mapping; a student deeper than its teacher has none and is compared at the last layers."""
    teacher_layers = manifest.teacher.layers
    if layers > teacher_layers:
        return ((layers, teacher_layers),)
    return parse_mapping(DEFAULT_MAPPING, teacher_layers, layers).pairs


def _exact_view(manifest: Manifest, has_head: bool, notes: list[str]) -> View | None:
    """The view with places to run the teacher at: whether anything is kept there does not matter."""
    view = manifest.teacher.distribution_view
    if view == "masked" and view not in manifest.targets.views():
        notes.append("no output KL: the cache holds no masked view to run the teacher on")
        return None
    if not manifest.teacher.has_mlm_head:
        notes.append("no output KL: the teacher has no head")
        return None
    if not has_head:
        notes.append(_without_head(manifest))
        return None
    notes.append("output KL and top-1 agreement are those to the teacher itself, over its whole distribution")
    return view


def _without_head(manifest: Manifest) -> str:
    head = "language-modelling" if manifest.teacher.causal else "masked-LM"
    return f"no output KL: the student has no {head} head"


def _logits_view(manifest: Manifest, has_head: bool, notes: list[str]) -> View | None:
    spec = manifest.targets.logits
    if spec is None:
        notes.append("no output KL: the cache holds no output distributions")
    elif not has_head:
        notes.append(_without_head(manifest))
    elif spec.form == "sample":
        notes.append(
            f"output KL is that to {spec.entries} ids drawn from the teacher, which is larger than that to its whole "
            "distribution; top-1 agreement is with the id most often drawn"
        )
    return spec.view if spec is not None and has_head else None
