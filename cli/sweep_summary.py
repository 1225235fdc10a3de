"""The results of a sweep: one line for each training, from the files in its folder.

In: folders of `kdtrain`, with `metrics.jsonl` and, where one is complete, `provenance.json`. Out: a table, and
`summary.json` and `summary.md` beside the folders. Nothing is loaded or measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from student_train.out_folder import explain_write_errors
from student_train.recorded_settings import recorded_identity
from student_train.run_files import METRICS_NAME, PROVENANCE, read_curves, run_provenance
from student_train.settings import TrainSettings
from teacher_cache.disk import write_whole
from teacher_cache.errors import SettingsError, TrainingError
from teacher_cache.fields import OpenFields, Text, check_fields
from teacher_cache.outside import parse_record
from teacher_cache.wording import format_duration

_LEGEND = "Losses: of the last validation / of the best one, on the held-out rows. Time: that of the training steps."


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One training. `last` and `best` are validations: the step and its losses, best by their weighted sum.

    `seconds` are those of its steps, over all resumptions; `wait_share` is the share of them without data.
    """

    name: str
    differs: Mapping[str, str]
    state: str
    out: str
    steps: int
    tokens: int
    last: Mapping[str, float]
    best: Mapping[str, float]
    tokens_per_second: float | None
    wait_share: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


class _Contents(OpenFields):
    identity_sha256: Text


class _Trained(OpenFields):
    """Of a student's provenance, what says whether it is the one asked for."""

    settings: dict[str, Any]
    cache: _Contents


def completed(asked: Mapping[str, TrainSettings]) -> list[str]:
    """Names of the runs whose students are in their folders. Opens the caches where there is one, and only then.

    Raises:
        SettingsError: a student there was trained with other settings or from another cache.
    """
    found, contents = [], dict[tuple[str, ...], str]()
    for name, settings in asked.items():
        path = Path(settings.out) / PROVENANCE
        if not _exists(path, name):
            continue
        try:
            record = check_fields(_Trained, parse_record(path.read_bytes()))
            before = recorded_identity(record.settings)
        except (OSError, ValueError, SettingsError) as error:
            raise SettingsError(
                f"run {name!r}: {str(path)!r} cannot be read ({error}), so whether that "
                "student is the one asked for cannot be told; delete the folder or choose another --out"
            ) from error
        if settings.cache not in contents:
            contents[settings.cache] = _contents(settings.cache)
        old = {
            **before,
            "--deepspeed": record.settings.get("deepspeed"),
            "cache contents": record.cache.identity_sha256,
        }
        new = {**settings.identity(), "--deepspeed": settings.deepspeed, "cache contents": contents[settings.cache]}
        differing = [flag for flag in new if old[flag] != new[flag]]
        if differing:
            changes = "; ".join(f"{flag} was {old[flag]!r} and is {new[flag]!r}" for flag in differing)
            raise SettingsError(
                f"run {name!r}: {settings.out!r} holds a student of other settings ({changes}): the summary would mix "
                "them; choose another --out, or delete that folder to train it anew"
            )
        found.append(name)
    return found


def _exists(path: Path, name: str) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise SettingsError(
            f"run {name!r}: {str(path)[:200]!r} cannot be ({error.strerror}), so no student can be written there; "
            "choose another --out, or fewer or shorter names for its runs"
        ) from error


def _contents(cache: tuple[str, ...]) -> str:
    from teacher_cache.read.pool import open_caches

    return open_caches(cache).identity_sha256


def summarise(name: str, differs: Mapping[str, str], settings: TrainSettings, state: str) -> RunSummary:
    """What a training has left so far."""
    try:
        records = read_curves(Path(settings.out) / METRICS_NAME)
    except TrainingError:
        records = []  # the training itself says what is wrong with it, and others go on
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "valid_loss" in record]
    seconds = sum(record["seconds"] for record in steps)
    tokens = steps[-1]["tokens"] if steps else 0
    return RunSummary(
        name=name,
        differs=differs,
        state=state,
        out=settings.out,
        steps=steps[-1]["step"] if steps else 0,
        tokens=tokens,
        last=_losses(validations[-1]) if validations else {},
        best=_losses(min(validations, key=lambda record: record["valid_loss"])) if validations else {},
        tokens_per_second=tokens / seconds if seconds else None,
        wait_share=sum(record["wait"] for record in steps) / seconds if seconds else None,
        seconds=seconds,
    )


def _losses(record: Mapping[str, float]) -> dict[str, float]:
    """By name, and the step."""
    return {key.removeprefix("valid_"): value for key, value in record.items() if key != "valid_skipped_rows"}


def write_summary(summaries: Sequence[RunSummary], out: Path) -> dict[str, Any]:
    """`summary.json` and `summary.md` in the folder of the sweep; returns what the first one holds.

    Raises:
        SpaceError, TrainingError: they cannot be written.
    """
    record = {"runs": [summary.to_json() for summary in summaries], **run_provenance()}
    texts = {
        "summary.json": json.dumps(record, indent=1, allow_nan=False) + "\n",
        "summary.md": f"{as_table(record['runs'])}\n\n{_LEGEND}\n",
    }
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(out / name, text)
    return record


def as_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a summary as an aligned table in Markdown."""
    parts = list(dict.fromkeys(part for run in runs for part in run["last"] if part != "step"))
    names = ("loss", *(part for part in parts if part != "loss")) if parts else ()
    heads = ["run", "differs", "state", "steps", "tokens", *names, "best step", "tok/s", "waiting", "time"]
    rows = [heads, *(_cells(run, names) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(run: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    last, best = run["last"], run["best"]
    differs = ", ".join(f"{flag} {value}" for flag, value in run["differs"].items()).replace("|", "\\|")
    losses = [f"{last[name]:.4g} / {best[name]:.4g}" if name in last else "–" for name in names]
    return [
        run["name"],
        differs or "–",
        run["state"],
        f"{run['steps']:,}",
        f"{run['tokens']:,}",
        *losses,
        _number(best.get("step"), ",.0f"),
        _number(run["tokens_per_second"], ",.0f"),
        _number(run["wait_share"], ".1%"),
        format_duration(run["seconds"]),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
