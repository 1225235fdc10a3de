"""First weights that depend on rows of the cache: of the student, and of the maps that are learned beside it.

In: rows to train on. Out: a student, and maps that begin at a regression. Cost: passes over some thousand positions
where a student is sliced, layers are chosen or maps are fitted; else nothing is read.
"""

from __future__ import annotations

from functools import partial

from student_train.data.first_rows import FirstRows
from student_train.data.split import count_rows
from student_train.methods.map_starts import fit_maps, rows_to_fit
from student_train.methods.model import DistillationModel
from student_train.methods.od import make_distribution_transfer
from student_train.students.layer_importance import IMPORTANCE_TOKENS, RowsWithTargets
from student_train.students.narrowing.sample import read_sample
from student_train.students.student import BuiltStudent, StudentPlan, build_student


def build_from_rows(plan: StudentPlan, first_rows: FirstRows, *, seed: int) -> BuiltStudent:
    """The student of a plan, with its first weights. The rows are in the teacher's ids.

    Raises:
        DistillationError: as `build_student`.
    """
    return build_student(
        plan,
        seed=seed,
        read_sample=partial(read_sample, first_rows, with_mlm_head=plan.with_mlm_head),
        read_targets=partial(_rows_with_targets, first_rows, plan),
    )


def _rows_with_targets(first_rows: FirstRows, student: StudentPlan) -> RowsWithTargets:
    """Some rows to train on with their cached distributions, as `od` compares a student's with them.

    More rows where few of their positions have a distribution: those of chats, of short documents, of --positions.
    """
    method = make_distribution_transfer(first_rows.source.manifest, student.config)
    count = max(1, IMPORTANCE_TOKENS // first_rows.seq_len)
    most = min(16 * count, count_rows(first_rows.rows))
    while True:
        batch = first_rows.read(method.request, count)[method.view]
        rows = RowsWithTargets(batch=batch, targets=method.targets(batch), temperature=method.temperature)
        if 4 * rows.places >= IMPORTANCE_TOKENS or count >= most:
            return rows
        count = min(2 * count, most)


def start_maps(model: DistillationModel, built: BuiltStudent, first_rows: FirstRows) -> bool:
    """Fit learned maps, unless they lead to copied layers; whether any was."""
    if built.whole_layers:
        # maps start at the identity there: the student shall stay in the teacher's coordinates
        return False
    rows, at_a_time = rows_to_fit(count_rows(first_rows.rows), first_rows.seq_len)
    return fit_maps(model, first_rows.batches(model.objective.request, rows, at_a_time))
