"""The section of a run's report on where it comes from: what `kdtrain` recorded, of the model or of its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student_train.evaluate.report.html import LACKING, Html, heading, missing, paragraph, table
from student_train.evaluate.run_records import RunRecords

_NOT_SETTINGS = ("json", "dry_run")
_FINE_TUNED = "kdeval finetune made this model of a student, says finetuned.json."


def provenance(records: RunRecords) -> list[Html]:
    """The cache, the versions and every setting; those of the student, where that was fine-tuned."""
    found, saved = records.origin, records.saved
    if saved is not None and not found:
        return [paragraph(f"{_FINE_TUNED} It names no provenance of that student: kdtrain did not train it.")]
    if not found:
        return [missing("There is no provenance.json: this model was not trained by kdtrain.", "kdtrain --help")]
    cache, held_out = found["cache"], found.get("held_out_rows", {})
    teacher = cache.get("teacher", {})
    lines = [
        ("trained", found.get("created")),
        ("teacher", teacher.get("name")),
        # an import knows none, and has another hash in their place
        ("its weights", None if "imported" in cache else teacher.get("weights_sha256")),
        ("cache", cache.get("path")),
        ("its contents", cache.get("identity_sha256")),
        ("rows", f"{cache.get('rows', 0):,}, of which {held_out.get('count', 0):,} were held out"),
        ("student", found.get("student", {}).get("description")),
        ("its weights", records.weights if saved is None else saved.base_weights),
        ("code", found.get("git_revision")),
        ("software", ", ".join(f"{name} {version}" for name, version in found.get("software", {}).items())),
    ]
    settings = [
        (_flag(name), _setting(value)) for name, value in records.origin_settings.items() if name not in _NOT_SETTINGS
    ]
    objective = [(name, _method_in_words(entry)) for name, entry in found.get("objective", {}).items()]
    return [
        *([] if saved is None else [paragraph(f"{_FINE_TUNED} This is of that student:")]),
        table(["", ""], [[name, str(value)] for name, value in lines if value], words=2),
        heading("Objective"),
        table(["method", "what it compares"], objective, words=2),
        heading("Settings"),
        table(["flag", "value"], settings, words=2),
    ]


def _method_in_words(description: object) -> str:
    """What a method compares: `relation heads 24, pairs 3 → 5, view plain`."""
    if isinstance(description, Mapping):
        return "; ".join(
            f"{str(name).replace('_', ' ')}: {_method_in_words(value)}" for name, value in description.items()
        )
    if isinstance(description, list):
        pairs = all(isinstance(entry, list) for entry in description)
        return ", ".join(" → ".join(map(str, entry)) if pairs else str(entry) for entry in description)
    return str(description)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _setting(value: Any) -> str:
    if value is None:
        return LACKING
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
