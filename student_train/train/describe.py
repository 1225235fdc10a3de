"""What a training is, said twice: in lines for whoever starts it, and as the record that its student carries.

In: a prepared run. Out: text, and JSON. Nothing is decided here.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from student_train.data.split import count_rows, share_out
from student_train.engine.config import HALF_SECTIONS
from student_train.run_files import run_provenance
from student_train.train.prepare import TrainingRun
from teacher_cache.read.pool import parts_of


def describe_run(run: TrainingRun) -> list[str]:
    """What is about to happen, in lines for a user to read."""
    settings, manifest = run.settings, run.reader.manifest
    teacher = manifest.teacher
    source = f"{manifest.rows:,} rows of {manifest.seq_len} tokens from {teacher.name}"
    held_out = f"the last {count_rows(run.held_out_rows):,} held out"
    if len(parts_of(run.reader)) > 1:
        held_out += ", of each store its share"
    lines = [
        f"cache    {run.reader.path}: {source} ({teacher.layers}x{teacher.hidden_size})",
        f"rows     {count_rows(run.training_rows):,} to train on, {held_out}",
        f"student  {run.built.description}",
    ]
    if run.vocabulary is not None:
        lines.append(f"ids      {run.vocabulary}")
    weights = run.objective.weights
    for name, description in run.objective.describe().items():
        details = ", ".join(f"{key.replace('_', ' ')} {_values_in_words(value)}" for key, value in description.items())
        lines.append(f"{name:8} weight {weights[name]:g}: {details}")
    if run.maps_fitted:
        lines.append("maps     start at the linear regression of the teacher's vectors on the student's")
    half = next((str(dtype)[6:] for dtype, name in HALF_SECTIONS.items() if run.config[name].get("enabled")), None)
    lines.append(
        f"training {run.steps:,} steps of {settings.batch_size} rows ({run.micro_batch} at a time"
        f"{_shared(run)}) on {run.device} in {half or 'float32'}, {_learning_rate(run)}"
    )
    if run.frozen:
        lines.append(f"frozen   {len(run.frozen)} parameters that no loss reaches, such as {run.frozen[0]}")
    return lines


def _shared(run: TrainingRun) -> str:
    return f" in each of {run.ranks.count} processes" if run.ranks.count > 1 else ""


def _learning_rate(run: TrainingRun) -> str:
    if "scheduler" in run.config:
        return f"learning rate by the scheduler in {run.settings.deepspeed!r}"
    return f"learning rate up to {run.config['optimizer']['params']['lr']:g}"


def provenance_of(run: TrainingRun) -> dict[str, Any]:
    """What the exported student carries about where it comes from."""
    manifest = run.reader.manifest
    return {
        **run_provenance(),
        "cache": {
            "path": run.reader.path,
            "identity_sha256": run.reader.identity_sha256,
            "rows": manifest.rows,
            "seq_len": manifest.seq_len,
            "corpus": asdict(manifest.corpus),
            "command": manifest.command,
            "teacher": asdict(manifest.teacher),
            **({} if manifest.imported is None else {"imported": manifest.imported}),
            **_stores(run),
        },
        "held_out_rows": {"first": run.held_out_rows[0].start, "count": count_rows(run.held_out_rows)},
        "student": {"description": run.built.description, "copied": list(run.built.copied)},
        **({} if run.vocabulary is None else {"vocabulary": run.vocabulary.record()}),
        "objective": run.objective.describe(),
        "adapted": run.objective.adapted(),
        **({"additions": run.additions} if run.additions else {}),
        "weights": run.objective.weights,
        "steps": run.steps,
        "settings": asdict(run.settings),
        "deepspeed": run.config,
    }


def _stores(run: TrainingRun) -> dict[str, Any]:
    """Where the cache is made of several stores: each of them, and how many of its rows, the last, are held out."""
    parts = parts_of(run.reader)
    if len(parts) == 1:
        return {}
    held_out = share_out(count_rows(run.held_out_rows), [part.rows for part in parts])
    stores = [
        {
            "path": part.path,
            "identity_sha256": part.identity_sha256,
            "rows": part.rows,
            "held_out": count,
            "command": part.manifest.command,
        }
        for part, count in zip(parts, held_out, strict=True)
    ]
    return {"stores": stores}


def _values_in_words(value: Any) -> str:
    """A description's value for a line of text; pairs of layers as student<-teacher."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " ".join(f"{student}<-{teacher}" for student, teacher in value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
