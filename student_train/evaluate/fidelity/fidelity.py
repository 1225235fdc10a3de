"""How close a student comes to its teacher on rows that it was not trained on: `kdeval fidelity`.

In: a student's directory and a cache of one store or several. Out: a `FidelityReport` with every measure that the two
allow.

- Relations: KL(teacher || student) of the query, key and value relations, as attention transfer defines it (MiniLMv2).
- Hidden states: ||h_T - W h_S - b||^2 / E||h_T - mean||^2 with the best linear map (ridge regression), fitted on one
  half of the rows and measured on the other. The projections of training are never exported, and students that were
  trained without any are measured by the same rule.
- Output distribution at masked positions, or after the positions that are kept of a causal teacher's rows: KL(teacher
  || student) with one bucket for all entries outside the teacher's K most probable ones, and the share of positions at
  which both name the same most probable entry. Where the cache holds draws instead, they stand for the distribution.

Cost: one student forward per view of the rows; memory for one batch and, per layer pair, d_S * (d_S + d_T) numbers. The
teacher is not needed. The student's projections, dropout and engine play no part: it is loaded from its directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from student_train.data.split import block_pieces, count_rows
from student_train.evaluate.fidelity.plan import FidelityPlan, plan_fidelity
from student_train.evaluate.fidelity.records import DistributionFidelity, FidelityReport
from student_train.evaluate.fidelity.sums import DistributionSum, HiddenSum, RelationSum
from student_train.evaluate.load import LoadedStudent, check_fit, load_student, weights_fingerprint
from student_train.methods.base import StudentOutputs
from student_train.methods.relation_heads import vector_widths
from student_train.students.vocabulary.kept_ids import KeptIds
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.contract.targets import View
from teacher_cache.errors import StoreError, StudentError, TeacherError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.models.placing import Placement
from teacher_cache.read.missing import without_weights
from teacher_cache.read.pool import CacheSource, open_caches, parts_of

_NO_PLACE: Mapping[View, str] = {
    "masked": (
        "no output KL: none of the measured rows has a masked position, as where the tokenizer knows nothing of their "
        "text"
    ),
    "plain": "no output KL: after none of the measured rows' positions is a distribution kept",
}
Advance = Callable[[int, int], None]
"""Told how many of the rows are done, and how many there are."""
Run = Callable[[TargetBatch, set[int]], StudentOutputs]
"""What a student computes on the input of a batch, and the attention vectors of some of its layers."""


def measure_fidelity(
    student: str | Path,
    caches: Sequence[str],
    *,
    rows: int | None = None,
    exact: bool = False,
    batch_size: int = 16,
    device: str = "cpu",
    placement: Placement | None = None,
    advance: Advance | None = None,
) -> FidelityReport:
    """Measure the student in a directory on the held-out rows of a cache.

    Args:
        student: what `kdtrain` wrote, or any Hugging Face encoder directory with the teacher's vocabulary.
        caches: paths of the stores, see `open_caches`.
        rows: at most so many of the held-out rows, the last ones.
        exact: run the teacher that the cache keeps too, and compare the student's output distribution with all of its.
        batch_size: rows per forward pass; changes memory and speed alone.
        device: where the student runs, and the teacher where it is not spread.
        placement: with `exact`, how a teacher is spread that is larger than one device.
        advance: called after every block of the cache.

    Raises:
        StudentError: the student cannot be loaded, has another vocabulary, or shares no measure with the cache.
        StoreError: the cache cannot be read, or the teacher is to run and was never there.
        TeacherError: it cannot be spread.
    """
    reader = open_caches(caches)
    if exact and (why := without_weights(reader.manifest, reader.path)) is not None:
        raise StoreError(
            f"{why}: the student cannot be compared with the teacher itself; leave out --exact to compare it with what "
            "is kept"
        )
    loaded = load_student(student, device)
    check_fit(loaded, reader.manifest, reader.teacher_folder())
    plan = plan_for(reader, loaded, rows=rows, exact=exact)
    plan = _without_untappable(plan, loaded)
    if plan.request == TargetRequest():
        raise StudentError(
            f"student {str(student)!r} can be compared with nothing in {reader.path!r} ({'; '.join(plan.notes)}): "
            "build a cache with --targets that the student can be measured on"
        )
    teacher = None
    if exact and plan.logits_view is not None:
        teacher = load_student(reader.teacher_folder(), device, placement)
    measurement = FidelitySums(plan, loaded, temperature=reader.manifest.temperature, teacher=teacher)
    with torch.inference_mode():
        for view, targets, row in read_measured(reader, plan, batch_size=batch_size, device=device, advance=advance):
            measurement.add(view, targets, row)
        report = measurement.report(str(student), reader.path)
    return replace(report, fingerprints=_fingerprints(reader, loaded.folder))


def plan_for(
    reader: CacheSource, student: LoadedStudent, *, rows: int | None = None, exact: bool = False
) -> FidelityPlan:
    """What to measure of a student on a cache; at most so many of the held-out rows."""
    return plan_fidelity(
        reader.manifest,
        stores=[(part.identity_sha256, part.rows) for part in parts_of(reader)],
        student_layers=student.config.num_hidden_layers,
        student_width=student.config.hidden_size,
        has_head=student.head is not None,
        provenance=student.provenance,
        rows=rows,
        exact=exact,
        vector_widths=vector_widths(student.config),
    )


def _without_untappable(plan: FidelityPlan, student: LoadedStudent) -> FidelityPlan:
    """Leave relations out where the family's attention cannot be recorded: the rest can be measured."""
    if not plan.relations:
        return plan
    token = torch.zeros((1, 1), dtype=torch.long, device=student.encoder.device)
    try:
        enable_tap(student.encoder)
        with torch.inference_mode(), record_attention(student.encoder, {1}):
            student.encoder(
                input_ids=token, **forward_arguments(student.encoder, torch.ones_like(token, dtype=torch.bool))
            )
    except TeacherError as error:
        return replace(plan, relations=(), notes=(*plan.notes, f"relations are not measured: {error}"))
    return plan


def _fingerprints(reader: CacheSource, folder: Path) -> dict[str, str]:
    manifest = reader.manifest
    return {
        "cache": reader.identity_sha256,
        "corpus": manifest.corpus.fingerprint,
        "teacher": manifest.teacher.weights_sha256,
        "student": weights_fingerprint(folder),
    }


def read_measured(
    reader: CacheSource, plan: FidelityPlan, *, batch_size: int, device: str = "cpu", advance: Advance | None = None
) -> Iterator[tuple[View, TargetBatch, int]]:
    """The rows of a plan with what it asks for, batch by batch: the view, its targets, the row that they begin with.

    Each block is read once in each view. `advance` is called after every block.
    """
    done, total = 0, count_rows(plan.rows)
    for block, start, stop in block_pieces(reader.block_bounds, plan.rows).tolist():
        offset = int(reader.block_bounds[block])
        for view in reader.views_for(plan.request):
            coded = reader.load_block(block, plan.request, view)
            for first in range(start, stop, batch_size):
                last = min(first + batch_size, stop)
                yield view, reader.decode(coded, first - offset, last - offset, device), first
        done += stop - start
        if advance is not None:
            advance(done, total)


class FidelitySums:
    """The sums behind a report, batch by batch."""

    def __init__(
        self,
        plan: FidelityPlan,
        student: LoadedStudent,
        *,
        temperature: float,
        teacher: LoadedStudent | None = None,
        run: Run | None = None,
    ) -> None:
        """Begin with nothing.

        Args:
            plan: what is compared.
            student: whose shape counts.
            temperature: of the cache's distributions.
            teacher: compare the output distribution with that of this model instead of what the cache keeps of it.
            run: what computes the student's outputs, where that is not `student` itself.
        """
        self.plan, self.student, self.teacher = plan, student, teacher
        self._run = partial(run_student, student) if run is None else run
        self.relations = {pair: RelationSum(pair) for pair in plan.relations}
        self.hidden = {pair: HiddenSum(pair, plan.rows) for pair in plan.hidden}
        kept = None if student.ids is None else student.ids.kept.ids_K
        self.distribution = DistributionSum(student.config.vocab_size, temperature, kept)
        self.unread = self.read = 0
        self.tokens: dict[View, int] = {}
        if plan.relations:
            enable_tap(student.encoder)

    def add(self, view: View, targets: TargetBatch, first_row: int) -> None:
        """Count the rows of `targets`, of which the first is row `first_row` of the cache."""
        relations = [pair for pair in self.relations if pair.view == view]
        hidden = [pair for pair in self.hidden if pair.view == view]
        outputs = self._run(targets, {pair.student_layer for pair in relations})
        for relation in relations:
            self.relations[relation].add(outputs, targets)
        for pair in hidden:
            self.hidden[pair].add(outputs, targets, first_row)
        if self.plan.logits_view == view:
            if self.teacher is None:
                own = targets if self.student.ids is None else self.student.ids.batch(targets)
                self.distribution.add(outputs, own)
            else:
                self.distribution.add_exact(outputs, run_student(self.teacher, targets, set()), targets)
        if self.student.ids is not None:
            self.unread += int((self.student.ids.dropped(targets.input_ids_BT) & targets.real_BT()).sum())
            self.read += int(targets.length_B.sum())
        self.tokens[view] = self.tokens.get(view, 0) + int(targets.length_B.sum())

    def _kept_note(self, kept: KeptIds) -> str:
        compared = "" if self.plan.logits_view is None else "; distributions are compared over the ids that it has"
        if self.plan.exact:
            compared += ", the teacher's made to sum to 1 there"
        return (
            f"the student has {len(kept):,} of its teacher's {kept.teacher_entries:,} ids: {self.unread:,} of the "
            f"{self.read:,} tokens read ({self.unread / max(1, self.read):.3%}) are others, and it reads an unknown "
            f"one there{compared}"
        )

    def _distribution(self) -> DistributionFidelity | None:
        """With what it is to, as divergences to other things do not compare."""
        found, kept = self.distribution.result(), self.plan.logits
        ids = None if self.student.ids is None else len(self.student.ids.kept)
        if found is not None and self.plan.exact:
            return replace(found, kind="exact", kept_ids=ids)
        if found is not None and kept is not None:
            return replace(found, kind=kept.form, entries=kept.entries, kept_ids=ids)
        return found

    def report(self, student: str, cache: str) -> FidelityReport:
        """The measures of everything added so far.

        Raises:
            StudentError: there is none, for want of a place.
        """
        distribution, notes = None, self.plan.notes
        if self.student.ids is not None:
            notes = (*notes, self._kept_note(self.student.ids.kept))
        if self.plan.logits_view is not None:
            distribution = self._distribution()
            if distribution is None:
                notes = (*notes, _NO_PLACE[self.plan.logits_view])
                if not self.relations and not self.hidden:
                    raise StudentError(
                        f"student {student!r} can be compared with nothing in {cache!r} ({'; '.join(notes)}): measure "
                        "more rows with --rows, or give a cache that was built from other text"
                    )
        return FidelityReport(
            student=student,
            cache=cache,
            first_row=self.plan.rows[0].start,
            last_row=self.plan.rows[-1].stop - 1,
            rows=count_rows(self.plan.rows),
            held_out=self.plan.held_out,
            tokens=max(self.tokens.values(), default=0),
            relations=tuple(found.result() for found in self.relations.values()),
            hidden=tuple(found.result() for found in self.hidden.values()),
            distribution=distribution,
            notes=notes,
        )


def run_student(student: LoadedStudent, targets: TargetBatch, attention_layers: set[int]) -> StudentOutputs:
    """One forward pass on exactly the input that the teacher read, in the student's ids where it has fewer."""
    with record_attention(student.encoder, attention_layers) as recorded:
        result = student.encoder(
            input_ids=student.reads(targets).input_ids_BT.long(),
            output_hidden_states=True,
            **forward_arguments(student.encoder, targets.real_BT(), targets.starts_BT),
        )
    return StudentOutputs(
        hidden=dict(enumerate(result.hidden_states)),
        attention=recorded.vectors,
        # a teacher that is spread over devices leaves it on the last of them
        last_hidden_BTD=result.last_hidden_state.to(targets.input_ids_BT.device),
        head=student.head,
    )
