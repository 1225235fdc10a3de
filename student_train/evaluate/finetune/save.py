"""The fine-tuned model that `kdeval finetune --save` keeps: a Hugging Face folder, and what it comes from.

`finetuned.json` beside the weights says which task, seed and learning rate it is of, what was measured of this very
model, on which examples, and where the student came from that was fine-tuned. Of a student that has only some of its
teacher's ids, the record of these comes along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.evaluate.finetune.records import SeedResult
from student_train.evaluate.finetune.tasks import Task
from student_train.evaluate.new_folder import whole_folder
from student_train.run_files import FINETUNED, PROVENANCE, run_provenance
from student_train.students.vocabulary.kept_ids import KeptIds
from teacher_cache.models.families import quiet_transformers
from teacher_cache.outside import parse_record


@dataclass
class BestModel:
    """The best of the models offered so far, and what it is of: seed and learning rate."""

    model: PreTrainedModel | None = None
    of: tuple[int, float] | None = None
    score: float = float("-inf")

    def offer(self, model: PreTrainedModel, of: tuple[int, float], score: float) -> None:
        """Keep a model if none before it is as good."""
        if score > self.score:
            self.model, self.of, self.score = model, of, score


def save_model(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    student: Path,
    task: Task,
    result: SeedResult,
    kept_ids: KeptIds | None,
    facts: Mapping[str, Any],
) -> None:
    """Write the model to a new folder, whole or not at all.

    Args:
        out: the folder.
        model: after its fine-tuning.
        tokenizer: the student's.
        student: the folder that was fine-tuned, whose provenance is handed on.
        task: what it was fine-tuned on, with its classes.
        result: the seed that it is of.
        kept_ids: which of its teacher's ids the student has, if only some.
        facts: further entries of the record.

    Raises:
        SpaceError, SettingsError: it cannot be written.
    """
    record = {
        "student": student.name,
        "task": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "columns": [list(accepted) for accepted in task.inputs],
        "label_column": list(task.label),
        "labels": list(task.labels),
        "own": task.own,
        "seed": result.seed,
        "learning_rate": result.learning_rate,
        "measures": {name: dict(measures) for name, measures in result.measures.items()},
        **facts,
        "base": _read_provenance(student / PROVENANCE),
        **run_provenance(),
    }
    with whole_folder("--save", out) as folder:
        with quiet_transformers():
            model.save_pretrained(folder, max_shard_size="1TB")
            tokenizer.save_pretrained(folder)
        # safetensors lets only its owner read a file
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        (folder / FINETUNED).write_text(text, encoding="utf-8")
        if kept_ids is not None:
            kept_ids.write(folder)


def _read_provenance(path: Path) -> Any:
    """What `kdtrain` says of the student, None where it did not train it."""
    try:
        return parse_record(path.read_bytes())
    except (OSError, ValueError):
        return None
