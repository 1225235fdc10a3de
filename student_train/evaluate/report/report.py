"""A run's report: everything that is known of one student, as one HTML page that needs no network.

In: the directory of a student, and for the relation maps a cache. Out: the page as text: summary, training curves,
fidelity per layer, relation maps of teacher and student, text, tasks, latency, where it comes from and the commands
that make it again. A section without its record names the command that makes it. Nothing is measured; with a cache the
student runs once on some row. Cost: a few seconds, and a page of some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_train.evaluate.perplexity.records import format_perplexity
from student_train.evaluate.report import sections
from student_train.evaluate.report.html import Html, contents, facts, heading_one, page, paragraph, section
from student_train.evaluate.run_records import RunRecords, read_run
from student_train.run_files import METRICS_NAME, read_curves
from teacher_cache.wording import format_bytes, format_duration


def make_report(run: str, caches: Sequence[str] = ()) -> Html:
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
        **({"tasks": ("Tasks", sections.tasks(records))} if records.tasks or not _causal(records) else {}),
        "latency": ("Latency", sections.latency(records)),
        "provenance": ("Where it comes from", sections.provenance(records)),
        "reproduce": ("Make it again", sections.reproduce(records)),
    }
    name = records.folder.resolve().name
    body = [
        heading_one(name),
        paragraph(_subtitle(records), "soft"),
        facts(_facts(records, metrics)),
        contents([(anchor, title) for anchor, (title, _) in parts.items()]),
        *(section(anchor, title, content) for anchor, (title, content) in parts.items()),
    ]
    return page(f"{name} – report", body)


def _causal(records: RunRecords) -> bool:
    return records.causal or records.perplexity is not None or records.lm_eval is not None


def _subtitle(records: RunRecords) -> str:
    teacher = records.provenance.get("cache", {}).get("teacher", {}).get("name")
    description = records.provenance.get("student", {}).get("description")
    family = "" if records.shape is None else records.shape.family
    taught = f"Student of {teacher}. " if teacher else ""
    return f"{taught}{description or family}".strip() or records.path


def _facts(records: RunRecords, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The tiles at the top: only what is known."""
    found: list[tuple[str, str]] = []
    if records.shape is not None:
        found.append(("shape", str(records.shape)))
        found.append(("parameters", f"{records.shape.parameters / 1e6:.2f}M"))
    if "method" in records.settings:
        found.append(("method", str(records.settings["method"])))
        found.append(("initialisation", str(records.settings.get("init"))))
    found += _training_facts(metrics)
    if records.fidelity is not None:
        found += [
            (measure.label, f"{measure.value:.3g}")
            for key, measure in records.fidelity.lines().items()
            if key.endswith(".total") or key in ("hidden.mean", "distribution.kl")
        ]
    if records.perplexity is not None:
        score = records.perplexity.student_score
        found += [("bits a byte", f"{score.bits_per_byte:.3f}"), ("perplexity", format_perplexity(score.perplexity))]
    if records.lm_eval is not None:
        found += [
            (f"{result.task}, {result.main}", f"{result.metrics[result.main].value:.3g}")
            for result in records.lm_eval.named
        ]
    found += [
        (f"{task}, {scores.metric} × 100", f"{100 * sum(scores.scores.values()) / len(scores.scores):.1f}")
        for task, scores in records.tasks.items()
    ]
    speedups = _speedups(records)
    if speedups:
        least, most = (f"{edge(speedups):.1f}×" for edge in (min, max))
        found.append(("faster than the teacher", least if least == most else f"{least} to {most}"))
    return found


def _speedups(records: RunRecords) -> list[float]:
    if records.latency is None:
        return []
    passes = [
        timing.teacher_median_ms / timing.median_ms
        for timing in records.latency.timings.values()
        if timing.teacher_median_ms is not None
    ]
    answers = [timing.speedup for timing in records.latency.generation.values() if timing.speedup is not None]
    return [*passes, *answers]


def _training_facts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    steps = [record for record in metrics if "loss" in record]
    found = []
    if steps:
        seconds = sum(record["seconds"] for record in steps)
        found.append(("steps", f"{steps[-1]['step']:,}"))
        found.append(("tokens", _count(steps[-1]["tokens"])))
        found.append(("time in steps", format_duration(seconds)))
        if "memory" in steps[-1]:
            found.append(("memory, most", format_bytes(steps[-1]["memory"])))
    validations = [record["valid_loss"] for record in metrics if "valid_loss" in record]
    if validations:
        found.append(("held-out loss, best", f"{min(validations):.4g}"))
    return found


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
