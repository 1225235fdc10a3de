"""Run the teacher again on some rows of a store and compare everything that is stored of them.

    rows, spread evenly -> decoded targets | teacher, several rows at a time | teacher, row by row -> a line per target

Each masked row is compared in one of its views, in turn. Cost: two forward passes of the teacher over the rows, and
reading the blocks that they are in. What lies in the store is taken as it is: whether it is what was written is for
`verify.py`, and comes first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from teacher_cache.contract.batch import AttentionVectors, TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import View
from teacher_cache.errors import StoreError, TeacherError
from teacher_cache.format.groups import read_commits, read_groups, whole_blocks
from teacher_cache.models.placing import Placement
from teacher_cache.read.missing import without_weights
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import Storage
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.verify.deep.logits import DrawComparison, TopkComparison
from teacher_cache.verify.deep.rows import DeepRow, InputComparison, RowComparison
from teacher_cache.verify.deep.tolerance import TargetCheck
from teacher_cache.verify.deep.vectors import CarriedComparison, RelationComparison, StreamComparison

_ROWS_AT_ONCE = 8


class DeepProgress(Protocol):
    """What a comparison tells while it runs."""

    def compared(self, done: int, total: int) -> None:
        """So many rows of all views have been compared."""


@dataclass(frozen=True, kw_only=True)
class DeepReport:
    """The outcome: the rows that were compared, and a line per thing compared."""

    rows: tuple[int, ...]
    checks: tuple[TargetCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is what the store declares."""
        return not any(check.problem for check in self.checks)


def deep_check(
    storage: Storage,
    rows: int,
    *,
    teacher: str | None = None,
    device: str = "auto",
    placement: Placement | None = None,
    progress: DeepProgress | None = None,
) -> DeepReport:
    """Compare so many rows of a store with the teacher that it keeps, or with the one that is named.

    With a `placement` the teacher is spread over devices; its weights are brought for every row anew.

    Raises:
        StoreError: the store is damaged, has no finished block, or was imported.
        TeacherError: the teacher is not the one that the store was built with, or cannot be spread.
    """
    reader, blocks = _open(storage)
    if (why := without_weights(reader.manifest, reader.path)) is not None:
        raise StoreError(
            f"{why}: nothing can be computed again to compare with; leave out --deep, which checks every byte"
        )
    model = _load_teacher(reader, teacher, device, placement)
    chosen = _spread(reader, blocks, rows)
    source = _CorpusRows(reader, model)
    views, checks, done = reader.manifest.targets.views(), [], 0
    for view in views:
        comparisons = _make_comparisons(reader, model, view)
        for masked_view in range(reader.manifest.views_of(view)):
            mine = chosen[masked_view :: reader.manifest.views_of(view)]
            for first in range(0, len(mine), _ROWS_AT_ONCE):
                part = mine[first : first + _ROWS_AT_ONCE]
                for row in source.read(view, masked_view, part):
                    for comparison in comparisons:
                        comparison.add(row)
                done += len(part)
                if progress is not None:
                    progress.compared(done, len(chosen) * len(views))
        checks += [check for comparison in comparisons for check in comparison.results()]
    return DeepReport(rows=tuple(chosen), checks=tuple(checks))


def _open(storage: Storage) -> tuple[CacheReader, list[int]]:
    """A reader, and the blocks that it can read: all of a finished store, the finished ones of another."""
    groups = read_groups(storage)
    if groups[0].seal is not None:
        reader = CacheReader.of(storage)
        return reader, list(range(reader.manifest.blocks))
    blocks = sorted(whole_blocks(groups[0], read_commits(storage, groups[0]), storage.list()))
    if not blocks:
        raise StoreError(
            f"{storage.location!r} has no finished block yet: there is nothing to compare with the teacher; run the "
            "same `kdcache build` again first"
        )
    return CacheReader(storage, groups[:1]), blocks


def _load_teacher(reader: CacheReader, name: str | None, device: str, placement: Placement | None) -> Teacher:
    manifest = reader.manifest
    folder = name or str(reader.teacher_folder())
    teacher = Teacher.load(folder, dtype=manifest.dtype, device=device, placement=placement)
    have, want = teacher.record.weights_sha256, manifest.teacher.weights_sha256
    if have != want:
        raise TeacherError(
            f"teacher {name or reader.path!r} has weights {have[:12]}, {reader.path!r} was built with "
            f"{manifest.teacher.name!r}, weights {want[:12]}: comparing the two says nothing about the store; give "
            "--teacher the one that built it, or leave it out to use the copy in the store"
        )
    for spec in manifest.targets.attention:
        teacher.tap()
        if spec.replay is not None and teacher.probe_replay(spec.layer, manifest.seq_len) is None:
            raise TeacherError(
                f"attention {spec.layer} of {reader.path!r} is computed again from what its projections read, and "
                "this version of Transformers computes it in another way: what is stored cannot be compared; use the "
                f"version that built it ({manifest.software.get('transformers', 'unknown')})"
            )
    teacher.start()
    return teacher


def _spread(reader: CacheReader, blocks: Sequence[int], count: int) -> list[int]:
    """So many rows, evenly over those of the blocks; all if there are fewer."""
    rows = [row for block in blocks for row in range(*reader.manifest.block_range(block))]
    count = min(count, len(rows))
    return [rows[(2 * number + 1) * len(rows) // (2 * count)] for number in range(count)]


def _make_comparisons(reader: CacheReader, teacher: Teacher, view: View) -> list[RowComparison]:
    """Everything that a store has in one view."""
    manifest = reader.manifest
    comparisons: list[RowComparison] = [InputComparison()] if view == "masked" else []
    inputs = {layer: reader.layout.attention_input(layer) for layer in reader.layout.attention}
    carried = {layer: one for layer, one in inputs.items() if one is not None and not one.projected}
    for stream in reader.layout.streams:
        # what is kept for attention alone is compared as what students get of it
        for_attention = stream in carried.values() and stream.path.startswith("attention/")
        if stream.view == view and not for_attention:
            relations = stream.relation_heads is not None
            comparisons.append((RelationComparison if relations else StreamComparison)(manifest, stream))
    comparisons += [CarriedComparison(reader, layer, one) for layer, one in carried.items() if one.view == view]
    logits = manifest.targets.logits
    if logits is not None and logits.view == view:
        kind = TopkComparison if logits.form == "topk" else DrawComparison
        comparisons.append(kind(manifest, logits, teacher))
    return comparisons


def _request(reader: CacheReader, view: View) -> TargetRequest:
    targets = reader.manifest.targets
    return TargetRequest(
        hidden_layers=tuple(spec.layer for spec in targets.hidden if spec.view == view),
        attention_layers=tuple(spec.layer for spec in targets.attention if spec.view == view),
        logits=targets.logits is not None and targets.logits.view == view,
    )


class _CorpusRows:
    """Rows of a store, decoded and computed."""

    def __init__(self, reader: CacheReader, teacher: Teacher) -> None:
        self.reader = reader
        self.teacher = teacher
        # of each row two things are read, its targets and the plain row
        self._load_block = lru_cache(maxsize=2)(reader.load_block)

    def read(self, view: View, masked_view: int, numbers: Sequence[int]) -> Iterator[DeepRow]:
        """Rows by number in one view."""
        request = _request(self.reader, view)
        decoded = [self._decode(number, request, view, masked_view) for number in numbers]
        live = _run(self.reader, self.teacher, view, concatenate(decoded))
        for place, (number, targets) in enumerate(zip(numbers, decoded, strict=True)):
            yield DeepRow(
                targets=targets,
                masked_view=masked_view,
                plain_ids_BT=self._decode(number, TargetRequest(), "plain", 0).input_ids_BT,
                live=_map(live, operator.itemgetter(slice(place, place + 1))),
                alone=_run(self.reader, self.teacher, view, targets),
            )

    def _decode(self, row: int, request: TargetRequest, view: View, masked_view: int) -> TargetBatch:
        manifest = self.reader.manifest
        block, place = divmod(row, manifest.block_rows)
        coded = self._load_block(block, request, view, masked_view)
        try:
            targets = self.reader.decode(coded, place, place + 1)
            # a teacher on a GPU would say this much worse
            if not bool(((targets.input_ids_BT >= 0) & (targets.input_ids_BT < manifest.teacher.vocab_size)).all()):
                raise IndexError(f"ids are beyond the {manifest.teacher.vocab_size} of the teacher")
        except IndexError as error:
            raise StoreError(
                f"row {row} of {self.reader.path!r} cannot be read by any teacher ({error}): it was written wrongly; "
                "build the store again"
            ) from error
        return targets


def _run(reader: CacheReader, teacher: Teacher, view: View, targets: TargetBatch) -> TeacherOutputs:
    layout, attention = reader.layout, [spec for spec in reader.manifest.targets.attention if spec.view == view]
    hidden = {spec.layer for spec in reader.manifest.targets.hidden if spec.view == view}
    inputs = [one for spec in attention if (one := layout.attention_input(spec.layer)) is not None]
    outputs = teacher.run(
        targets.input_ids_BT,
        targets.length_B,
        hidden_layers=hidden | {one.layer for one in inputs if one.source == "hidden"},
        attention_layers=[spec.layer for spec in attention],
        given_layers=[one.layer for one in inputs if one.source == "given"],
        starts_BT=targets.starts_BT,
    )
    return _map(outputs, torch.Tensor.cpu)


def _map(outputs: TeacherOutputs, function: Callable[[torch.Tensor], torch.Tensor]) -> TeacherOutputs:
    return TeacherOutputs(
        hidden={layer: function(values) for layer, values in outputs.hidden.items()},
        attention={
            layer: AttentionVectors(**{f"{name}_BTD": function(getattr(vectors, f"{name}_BTD")) for name in VECTORS})
            for layer, vectors in outputs.attention.items()
        },
        final_BTD=function(outputs.final_BTD),
        given={layer: function(values) for layer, values in outputs.given.items()},
    )
