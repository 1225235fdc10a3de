"""A run's report: everything that is known of one student, as one HTML page that needs no network.

In: the directory of a student, and for the relation maps a cache. Out: the page as text: a verdict in words and the
settings that matter; to unfold below them training curves, fidelity per layer, relation maps of teacher and student,
text, tasks, latency, where it comes from and the commands that make it again. A section without its record names the
command that makes it. Nothing is measured; with a cache the student runs once on some row. Cost: a few seconds, and a
page of some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_train.evaluate.report import sections
from student_train.evaluate.report.html import facts, heading_one, page, paragraph, said, section
from student_train.evaluate.report.provenance import provenance
from student_train.evaluate.report.reproduce import reproduce
from student_train.evaluate.report.verdict import verdict
from student_train.evaluate.run_records import RunRecords, read_run
from student_train.run_files import METRICS_NAME, read_curves
from teacher_cache.wording import format_bytes

_TITLES = {"weights": "their weights", "init": "initialisation", "lr": "learning rate", "batch_size": "rows a step"}


def make_report(run: str, caches: Sequence[str] = ()) -> str:
    """The report of the run in a directory.

    Args:
        run: what `kdtrain` wrote, or any model that `kdeval` measured.
        caches: stores to take the teacher's relations from; without any there are no relation maps.

    Raises:
        StudentError, TrainingError: there is nothing to read, or a record is damaged.
        StoreError: a cache cannot be read.
    """
    records = read_run(run)
    metrics = read_curves(records.folder / METRICS_NAME)
    parts = {
        "training": ("Training", sections.training(metrics)),
        "fidelity": ("Fidelity to the teacher", sections.fidelity(records)),
        "relations": ("Attention relations of a sentence", sections.relations(records, caches)),
        **({"perplexity": ("Text", sections.perplexity(records))} if _causal(records) else {}),
        **({"harness": ("lm-evaluation-harness", sections.lm_eval(records))} if _causal(records) else {}),
        **(
            {"tasks": ("Tasks", sections.tasks(records))}
            if records.tasks or records.saved or not _causal(records)
            else {}
        ),
        "latency": ("Latency", sections.latency(records)),
        # where none was ever made, nobody misses it
        **({"onnx": ("ONNX files", sections.onnx(records))} if records.onnx or "onnx.json" in records.stale else {}),
        "provenance": ("Where it comes from", provenance(records)),
        "reproduce": ("Make it again", reproduce(records)),
    }
    name = records.folder.resolve().name
    settings = _settings(records, metrics)
    body = [
        heading_one(name),
        paragraph(_subtitle(records), "soft"),
        said(verdict(records, metrics)),
        *([facts("Settings that matter", settings)] if settings else []),
        *(section(anchor, title, content) for anchor, (title, content) in parts.items()),
    ]
    return page(f"{name} – report", body)


def _causal(records: RunRecords) -> bool:
    return records.causal or records.perplexity is not None or records.lm_eval is not None


def _subtitle(records: RunRecords) -> str:
    teacher = records.origin.get("cache", {}).get("teacher", {}).get("name")
    description = records.origin.get("student", {}).get("description")
    family = "" if records.shape is None else records.shape.family
    taught = f"Student of {teacher}. " if teacher else ""
    tuned = "" if records.saved is None else f", fine-tuned on {records.saved.task}"
    return f"{taught}{description or family}{tuned}".strip() or records.path


def _settings(records: RunRecords, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The tiles: what was asked for, as far as it is known."""
    settings, found = records.origin_settings, list[tuple[str, str]]()
    if records.shape is not None:
        found += [("shape", str(records.shape)), ("parameters", f"{records.shape.parameters / 1e6:.2f}M")]
    for name in ("method", "weights", "mapping", "init", "lr", "batch_size"):
        used = name != "mapping" or "hs" in str(settings.get("method")).split("+")
        if settings.get(name) is not None and used:
            found.append((_TITLES.get(name, name), str(settings[name])))
    steps = [record for record in metrics if "loss" in record]
    if steps:
        found += [("steps", f"{steps[-1]['step']:,}"), ("tokens", _count(steps[-1]["tokens"]))]
        if "memory" in steps[-1]:
            found.append(("memory, most", format_bytes(steps[-1]["memory"])))
    if rows := records.origin.get("cache", {}).get("rows"):
        found.append(("rows cached", f"{rows:,}"))
    return found


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
