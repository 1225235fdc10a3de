"""What came of the trainings of a sweep: one line each, from what they left in their folders.

In: folders of `kdtrain`, with `metrics.jsonl` and, where one is complete, `provenance.json`. Out: a table, and
`summary.json` and `summary.md` beside the folders. Nothing is loaded or measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_train.disk import clear_write_errors
from student_train.export import PROVENANCE
from student_train.metrics import METRICS_NAME, read_records
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError
from teacher_cache.units import format_duration

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One training. `valid` are the losses of its last validation, `wait_share` the share of its time without data."""

    name: str
    differs: Mapping[str, str]
    state: str
    out: str
    steps: int
    tokens: int
    valid: Mapping[str, float]
    best_valid_loss: float | None
    tokens_per_second: float | None
    wait_share: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def is_complete(name: str, settings: TrainSettings) -> bool:
    """Whether the student of these settings is in their folder.

    Raises:
        SettingsError: the student there was trained with other settings.
    """
    path = Path(settings.out) / PROVENANCE
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"run {name!r}: {str(path)!r} cannot be read ({type(error).__name__}: {error}), so whether that student "
            "is the one asked for cannot be told; delete the folder or choose another --out"
        ) from error
    wanted = settings.identity()
    before = {f"--{flag.replace('_', '-')}": value for flag, value in recorded.items()}
    differing = [flag for flag in wanted if before.get(flag) != wanted[flag]]
    if differing:
        changes = "; ".join(f"{flag} was {before.get(flag)!r} and is {wanted[flag]!r}" for flag in differing)
        raise SettingsError(
            f"run {name!r}: {settings.out!r} holds a student of other settings ({changes}): the summary would mix "
            "them; choose another --out, or delete that folder to train it anew"
        )
    return True


def summarise(name: str, differs: Mapping[str, str], settings: TrainSettings, state: str) -> RunSummary:
    """What a training has left so far."""
    records = read_records(Path(settings.out) / METRICS_NAME)
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "valid_loss" in record]
    seconds = sum(record["seconds"] for record in steps)
    tokens = steps[-1]["tokens"] if steps else 0
    last = validations[-1] if validations else {}
    return RunSummary(
        name=name,
        differs=differs,
        state=state,
        out=settings.out,
        steps=steps[-1]["step"] if steps else 0,
        tokens=tokens,
        valid={key: value for key, value in last.items() if key.startswith("valid_")},
        best_valid_loss=min((record["valid_loss"] for record in validations), default=None),
        tokens_per_second=tokens / seconds if seconds else None,
        wait_share=sum(record["wait"] for record in steps) / seconds if seconds else None,
        seconds=seconds,
    )


def write_summary(summaries: Sequence[RunSummary], out: Path) -> None:
    """`summary.json` and `summary.md` in the folder of the sweep.

    Raises:
        SpaceError, TrainingError: they cannot be written.
    """
    cells = [[_plain(cell) for cell in row] for row in ([*_columns(summaries)], *_rows(summaries))]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    texts = {
        "summary.json": json.dumps([summary.to_json() for summary in summaries], indent=1) + "\n",
        "summary.md": "\n".join(lines) + "\n",
    }
    with clear_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = out / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)


def as_table(summaries: Sequence[RunSummary]) -> Table:
    """The same for a terminal."""
    from rich.table import Table

    table = Table()
    for number, column in enumerate(_columns(summaries)):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    for row in _rows(summaries):
        table.add_row(*row)
    return table


def _columns(summaries: Sequence[RunSummary]) -> list[str]:
    return ["run", "state", "steps", "tokens", *_parts(summaries), "best valid", "tok/s", "waiting", "time"]


def _parts(summaries: Sequence[RunSummary]) -> list[str]:
    """Every validation loss that some run has: methods differ from run to run."""
    return list(dict.fromkeys(part for summary in summaries for part in summary.valid))


def _rows(summaries: Sequence[RunSummary]) -> list[list[str]]:
    parts = _parts(summaries)
    return [
        [
            summary.name,
            summary.state,
            f"{summary.steps:,}",
            f"{summary.tokens:,}",
            *(_number(summary.valid.get(part), ".4g") for part in parts),
            _number(summary.best_valid_loss, ".4g"),
            _number(summary.tokens_per_second, ",.0f"),
            _number(summary.wait_share, ".1%"),
            format_duration(summary.seconds),
        ]
        for summary in summaries
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|")
