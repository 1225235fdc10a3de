"""The student of the lowest validation loss so far, kept in OUT/best as a Hugging Face directory.

OUT/best exists as long as it is better on the held-out rows than the student in training, and at the end than the last
one. Where the last step turns out best, OUT itself holds that student and OUT/best is deleted. Cost: the student's
weights are written at every validation that is better than all before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_train.engine.engine import full_precision_weights
from student_train.out_folder import delete_marked, explain_write_errors
from student_train.run_files import PROVENANCE
from student_train.students.export import export_student
from student_train.students.student import with_weights
from student_train.train.describe import provenance_of
from student_train.train.prepare import TrainingRun
from teacher_cache.fields import Count, OpenFields, check_fields
from teacher_cache.outside import parse_record

FOLDER_NAME = "best"


class _Result(OpenFields):
    step: Count


class _Kept(OpenFields):
    """Of the provenance of the student that is kept, which step it is of."""

    result: _Result


def keep_best(run: TrainingRun, *, result: Mapping[str, Any]) -> None:
    """Write the student as it is now, in place of the best one before. Every process calls it.

    Raises:
        SpaceError, TrainingError: it cannot be written.
    """
    weights = full_precision_weights(run.built.model)
    with run.ranks.together():
        if run.ranks.first:
            write_student(run, weights, _folder(run), result=result)


def write_student(run: TrainingRun, weights: Mapping[str, Any] | None, out: Path, *, result: Mapping[str, Any]) -> None:
    """Export the student of a run with these weights, its own if there are none, and where it comes from.

    Raises:
        SpaceError, TrainingError: it cannot be written.
        StudentError: what was written does not load again.
    """
    export_student(
        run.built.model if weights is None else with_weights(run.built.model, weights),
        out,
        teacher_folder=run.reader.teacher_folder(),
        vocabulary=None if run.vocabulary is None else (run.vocabulary.kept, run.vocabulary.tokenizer),
        seq_len=run.reader.manifest.seq_len,
        provenance={**provenance_of(run), "result": result},
    )


def drop_best(run: TrainingRun) -> None:
    """Delete OUT/best, if there is one. For the first process.

    Raises:
        TrainingError: it cannot be deleted.
    """
    if _folder(run).exists():
        with explain_write_errors(_folder(run)):
            delete_marked(_folder(run), PROVENANCE)


def match_best(run: TrainingRun, best_step: int) -> bool:
    """Whether OUT/best is the student of `best_step`, where a run goes on; another one is deleted.

    It is another one where the run had been further than the checkpoint that it goes on from.

    Raises:
        TrainingError: it cannot be deleted.
    """
    try:
        kept = check_fields(_Kept, parse_record((_folder(run) / PROVENANCE).read_bytes())).result.step
    except (OSError, ValueError):
        kept = None
    if kept == best_step:
        return True
    drop_best(run)
    return False


def _folder(run: TrainingRun) -> Path:
    return Path(run.settings.out) / FOLDER_NAME
