"""What was measured of a model's ONNX files, as a plain record that turns into JSON and back, and as a table.

`kdeval export` leaves an `OnnxReport` in the student's directory as onnx.json. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from student_train.evaluate.onnx.schemas import OnnxSchema
from teacher_cache.fields import check_fields
from teacher_cache.outside import visible
from teacher_cache.wording import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

LACKING = "–"
INT8 = "int8"
"""What the arithmetic of an int8 file begins with; the kind of its scales follows."""


@dataclass(frozen=True, kw_only=True)
class OnnxTiming:
    """One pass of [batch_size, seq_len] random ids, in milliseconds."""

    batch_size: int
    seq_len: int
    threads: int
    median_ms: float
    p90_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A file, or the model itself in PyTorch where `file` is None; what was not measured is None.

    `max_error` is the largest absolute difference to PyTorch on random ids; `cosine` the mean over real tokens of
    held-out rows of the cosine between the file's output and the float model's, and `agreement` the share of these
    tokens at which both find the same id most probable. `hidden_nmse` and `output_kl` are distances to the teacher, as
    `kdeval fidelity` measures them; `score` is of the task that the model was fine-tuned on.
    """

    file: str | None
    arithmetic: str
    bytes: int
    max_error: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    hidden_nmse: float | None = None
    output_kl: float | None = None
    score: float | None = None
    timings: tuple[OnnxTiming, ...] = ()

    @property
    def name(self) -> str:
        """`PyTorch, float32`, `ONNX, int8 dynamic`."""
        return f"{'PyTorch' if self.file is None else 'ONNX'}, {self.arithmetic}"

    def milliseconds(self, batch_size: int) -> float | None:
        """The median at a batch size."""
        return next((timing.median_ms for timing in self.timings if timing.batch_size == batch_size), None)


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """Files of one model side by side, PyTorch first.

    Fidelity is of `rows` rows of a cache, scales of `calibration_rows` others; 0 where there was none. `metric` is that
    of the scores, on so many `examples`.
    """

    student: str
    output: str
    files: tuple[OnnxFile, ...]
    rows: int = 0
    held_out: bool = False
    calibration_rows: int = 0
    metric: str | None = None
    examples: int = 0
    hardware: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def int8(self) -> OnnxFile | None:
        """The int8 file whose outputs are nearest to the float model's; the first where that was not measured."""
        found = [each for each in self.files if each.arithmetic.startswith(INT8)]
        return max(found, key=lambda each: -2.0 if each.cosine is None else each.cosine, default=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        record = asdict(self)
        record["files"] = [{**each, "timings": list(each["timings"])} for each in record["files"]]
        record["notes"] = list(self.notes)
        return record

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; other entries are left alone.

        Raises:
            ValueError: an entry is missing, or is not what it must be.
        """
        fields = check_fields(OnnxSchema, data).model_dump()
        files = tuple(
            OnnxFile(**{**each, "timings": tuple(OnnxTiming(**timing) for timing in each["timings"])})
            for each in fields["files"]
        )
        return cls(**{**fields, "files": files, "notes": tuple(fields["notes"])})


def onnx_columns(report: OnnxReport) -> dict[str, list[str]]:
    """Cells by column, those left out that nothing is known for; a line for each file."""
    files = report.files
    timed = list(dict.fromkeys((timing.batch_size, timing.seq_len) for each in files for timing in each.timings))
    columns = {
        "model": [each.name for each in files],
        "size": [format_bytes(each.bytes) for each in files],
        **{
            f"ms, {batch_size} x {seq_len}": [_cell(each.milliseconds(batch_size), ".3g") for each in files]
            for batch_size, seq_len in timed
        },
        "largest error": [_cell(each.max_error, ".1e") for each in files],
        "cosine": [_cell(each.cosine, ".4f") for each in files],
        "agreement": [_cell(each.agreement, ".1%") for each in files],
        "hidden NMSE": [_cell(each.hidden_nmse, ".4g") for each in files],
        "output KL": [_cell(each.output_kl, ".4g") for each in files],
        str(report.metric): [_cell(None if each.score is None else 100 * each.score, ".2f") for each in files],
    }
    return {name: cells for name, cells in columns.items() if set(cells) != {LACKING}}


def onnx_caption(report: OnnxReport) -> str:
    """What the columns mean, of those that are there."""
    columns, parts = onnx_columns(report), []
    if any(name.startswith("ms") for name in columns):
        threads = sorted({timing.threads for each in report.files for timing in each.timings})
        parts.append(
            f"Median milliseconds of a pass of so many rows x tokens of random ids, CPU threads: {_some(threads)}, in "
            f"turns ({report.hardware})."
        )
    if "largest error" in columns:
        parts.append("Largest error: absolute difference to PyTorch on random ids with padding, in several shapes.")
    if "cosine" in columns:
        kind = "held-out rows" if report.held_out else "rows, not known to be held out,"
        parts.append(f"Cosine with PyTorch's output at the tokens of {report.rows} {kind} of text.")
    if "agreement" in columns:
        parts.append("Agreement: both find the same id most probable there.")
    if "hidden NMSE" in columns or "output KL" in columns:
        parts.append("Hidden NMSE and output KL (nats): distance to the teacher on the same rows, lower is better.")
    if report.metric in columns:
        parts.append(f"{report.metric} x 100 on {report.examples:,} examples.")
    if report.calibration_rows:
        parts.append(f"Static scales are those of {report.calibration_rows} other rows.")
    return " ".join(parts)


def onnx_table(name: str, report: OnnxReport) -> Table:
    """For a terminal: one line per file."""
    from rich.markup import escape
    from rich.table import Table

    columns = onnx_columns(report)
    table = Table(
        title=escape(visible(f"{name}: {report.output}")),
        caption=escape(onnx_caption(report)),
        title_justify="left",
        caption_justify="left",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _cell(value: float | None, form: str) -> str:
    return LACKING if value is None else f"{value:{form}}"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
