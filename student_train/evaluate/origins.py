"""Where a model comes from: what `kdtrain` says of a student, and `kdeval finetune --save` of what it made of one.

In: provenance.json and finetuned.json of a model's folder. Out: the provenance as it is, and a `SavedModel`: scores of
the very weights that lie there, where those of finetune-TASK.json are of copies of a student, and the provenance of the
student.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_train.evaluate.schemas import SavedSchema, check_record, read_object
from student_train.recorded_settings import as_today, check_recorded
from student_train.run_files import FINETUNED
from student_train.run_schemas import ProvenanceSchema
from teacher_cache.errors import StudentError
from teacher_cache.fields import check_fields


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A finetuned.json. `scores` are in the task's metric, by set of examples, as is the number of `examples`.

    `base` is the provenance of the student that was fine-tuned, empty where kdtrain did not train it; `base_weights`
    is the fingerprint of its weights. `commands` trained and fine-tuned it.
    """

    task: str
    metric: str
    seed: int
    learning_rate: float
    scores: Mapping[str, float]
    examples: Mapping[str, int]
    notes: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    base_weights: str | None = None
    commands: tuple[str, ...] = ()

    @property
    def score(self) -> float | None:
        """On the dev set, or the mean over the test sets where there are any, as finetune-TASK.json has it."""
        tests = [score for name, score in self.scores.items() if name != "dev"]
        return statistics.fmean(tests or self.scores.values()) if self.scores else None

    def to_json(self) -> dict[str, Any]:
        """What a comparison says of it."""
        return {
            "task": self.task,
            "metric": self.metric,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "scores": dict(self.scores),
        }

    def __str__(self) -> str:
        """`sst2, seed 1, learning rate 3e-05: accuracy × 100 is 91.20 on dev`."""
        scores = ", ".join(f"{100 * score:.2f} on {name}" for name, score in self.scores.items())
        return f"{self.task}, seed {self.seed}, learning rate {self.learning_rate:g}: {self.metric} × 100 is {scores}"


def read_provenance(path: Path) -> Mapping[str, Any]:
    """What `kdtrain` says of a student; nothing where it did not train it.

    Raises:
        StudentError: the file is no such record.
    """
    if not path.exists():
        return {}
    try:
        return _checked(read_object(path))
    except ValueError as error:
        raise StudentError(
            f"{str(path)!r} is no record of kdtrain: {error}; restore the file, or delete it to take the model as one "
            "from elsewhere"
        ) from error


def read_saved(folder: Path) -> SavedModel | None:
    """What `kdeval finetune --save` says of the model; None where it did not make it.

    Raises:
        StudentError: its record cannot be read.
    """
    path = folder / FINETUNED
    if not path.exists():
        return None
    record = read_object(path)
    fields = check_record(SavedSchema, path, record)
    try:
        base = _checked(record.get("base"))
    except ValueError:
        base = {}
    return SavedModel(
        task=fields.task,
        metric=fields.metric,
        seed=fields.seed,
        learning_rate=fields.learning_rate,
        scores={
            name: measures[fields.metric] for name, measures in fields.measures.items() if fields.metric in measures
        },
        examples=fields.examples,
        notes=tuple(fields.notes),
        base=base,
        base_weights=fields.fingerprints.get("weights"),
        commands=tuple(command for command in (base.get("command"), fields.command) if command),
    )


def _checked(record: Any) -> dict[str, Any]:
    """A provenance in today's types.

    Raises:
        ValueError: it is none; the message names the field.
    """
    if isinstance(record, dict) and isinstance(record.get("settings"), dict):
        record = {**record, "settings": as_today(record["settings"])}
    check_fields(ProvenanceSchema, record)
    check_recorded(record)
    found: dict[str, Any] = record
    return found
