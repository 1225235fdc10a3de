"""What fine-tuning found, as a plain record that turns into JSON, and as a table for people.

`kdeval finetune` writes it into the student's directory as finetune-TASK.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_train.evaluate.schemas import KeptSchema
from teacher_cache.disk import write_whole
from teacher_cache.fields import check_fields
from teacher_cache.outside import parse_record, visible

if TYPE_CHECKING:
    from rich.table import Table


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One seed at the learning rate that was best on the dev set.

    `measures` has every metric by set of examples, `cut` how many examples of each set were too long, and `constant`
    names the sets in which every example got the same prediction.
    """

    seed: int
    learning_rate: float
    measures: Mapping[str, Mapping[str, float]]
    cut: Mapping[str, int]
    constant: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """All seeds of a student on a task. `tests` names the test sets; without any, the dev set is what is reported.

    `sources` are the files, or datasets of the hub as `name:config:split`, that each set was read from.
    """

    student: str
    task: str
    metric: str
    seeds: tuple[SeedResult, ...]
    tests: tuple[str, ...]
    examples: Mapping[str, int]
    settings: Mapping[str, Any]
    fingerprint: str
    sources: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> list[float]:
        """One per seed: on the dev set, or the mean over the test sets where there are any."""
        sets = self.tests or ("dev",)
        return [statistics.fmean(result.measures[name][self.metric] for name in sets) for result in self.seeds]

    def scores_on(self, name: str) -> list[float]:
        """One per seed, on one set of examples."""
        return [result.measures[name][self.metric] for result in self.seeds]

    def to_json(self) -> dict[str, Any]:
        """The JSON object, means and standard deviations (of a sample; null for one seed) spelled out."""
        record: dict[str, Any] = {
            "student": self.student,
            "task": self.task,
            "metric": self.metric,
            **_summarise(self.scores),
            "seeds": [result.seed for result in self.seeds],
            "learning_rates": [result.learning_rate for result in self.seeds],
            "all_metrics": [dict(result.measures) for result in self.seeds],
            "examples": dict(self.examples),
            "sources": dict(self.sources),
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }
        if self.tests:
            record["by_test"] = {name: _summarise(self.scores_on(name)) for name in self.tests}
        return record


def _summarise(scores: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"scores": list(scores), "mean": statistics.fmean(scores), "sd": deviation}


def finetune_table(name: str, report: FinetuneReport) -> Table:
    """One line per set of examples, one column per seed, in hundredths as the field writes them."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(visible(f"{report.task} of {name}: {report.metric} × 100")),
        caption=_caption(report),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measured on")
    for result in report.seeds:
        table.add_column(f"seed {result.seed}", justify="right")
    table.add_column("mean ± sd" if len(report.seeds) > 1 else "mean", justify="right", style="bold")
    for each in ("dev", *report.tests):
        table.add_row(escape(visible(f"{each} ({report.examples[each]:,})")), *score_cells(report.scores_on(each)))
    if len(report.tests) > 1:
        table.add_row("mean of the tests", *score_cells(report.scores), style="bold")
    if len(report.settings["learning_rates"]) > 1:
        table.add_row("best --lr on dev", *(f"{result.learning_rate:g}" for result in report.seeds), "")
    return table


def score_cells(scores: Sequence[float]) -> list[str]:
    """Each score and then their mean ± standard deviation, in hundredths; a single score has none."""
    summary = _summarise(scores)
    spread = "" if summary["sd"] is None else f" ± {100 * summary['sd']:.2f}"
    return [*(f"{100 * score:.2f}" for score in scores), f"{100 * summary['mean']:.2f}{spread}"]


def _caption(report: FinetuneReport) -> str:
    settings = report.settings
    return (
        f"{report.examples['train']:,} examples to train on, {settings['epochs']:g} epochs, batches of "
        f"{settings['batch_size']}, --lr {', '.join(f'{rate:g}' for rate in settings['learning_rates'])}, at most "
        f"{settings['max_length']} tokens"
    )


def identify(key: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()


class ResultCache:
    """The results in one folder. Those that lack one of `names` do not count."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, set(names)
        self.writable = True

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a run, None if it is not there; a damaged file counts as none."""
        try:
            entry = check_fields(KeptSchema, parse_record(self._file(key).read_bytes()))
        except (OSError, ValueError):
            return None
        result = entry.result.model_dump(exclude_unset=True)
        return result if entry.key == key and result.keys() == self.names else None

    def keep(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Remember a result; says once on the log where that is not possible."""
        file = self._file(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"key": key, "result": result}, indent=2))
        except OSError as error:
            if self.writable:
                log.warning(
                    "results are not kept, for %r cannot be written to (%s): a second run starts from the beginning; "
                    "give --cache-dir a folder that can",
                    str(self.folder),
                    error.strerror,
                )
            self.writable = False

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{identify(key)}.json"
