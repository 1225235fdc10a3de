"""What a measurement of latency found, as plain records that turn into JSON, and as tables for people.

`kdeval latency` writes a `LatencyReport` into the student's directory as latency.json. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from teacher_cache.outside import visible
from teacher_cache.wording import format_bytes

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters of an encoder, those in its embedding tables, and the size of its folder's weight files.

    The files may hold a masked-LM head too, which is not among the parameters.
    """

    parameters: int
    embedding_parameters: int
    bytes: int

    def __str__(self) -> str:
        rest = self.parameters - self.embedding_parameters
        return (
            f"{self.parameters / 1e6:.1f}M parameters, {rest / 1e6:.1f}M without embeddings, "
            f"{format_bytes(self.bytes)} on disk"
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One forward pass of [batch_size, seq_len] tokens, timed `runs` times; `threads` are those of the host."""

    backend: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    seq_len: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    teacher_median_ms: float | None = None

    @property
    def speedup(self) -> float | None:
        """The teacher's median over the student's."""
        return None if self.teacher_median_ms is None else self.teacher_median_ms / self.median_ms

    def to_json(self) -> dict[str, Any]:
        """The JSON object, speed-up included."""
        return {**asdict(self), "speedup": self.speedup}


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """All measurements of a student, beside its teacher if there is one.

    `onnx_max_error` is the largest difference between an output of the student in ONNX Runtime and in PyTorch.
    """

    student: str
    teacher: str | None
    student_size: ModelSize
    teacher_size: ModelSize | None
    measurements: tuple[Measurement, ...]
    onnx_max_error: float | None
    hardware: Mapping[str, Any]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            **asdict(self.student_size),
            "teacher_parameters": self.teacher_size.parameters if self.teacher_size else None,
            "teacher_embedding_parameters": self.teacher_size.embedding_parameters if self.teacher_size else None,
            "teacher_bytes": self.teacher_size.bytes if self.teacher_size else None,
            "measurements": [measurement.to_json() for measurement in self.measurements],
            "onnx_max_error": self.onnx_max_error,
            "hardware": dict(self.hardware),
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }


def latency_tables(name: str, report: LatencyReport) -> Group:
    """One table per backend, device and number of threads; the teacher's columns are there if it was measured."""
    from rich.console import Group
    from rich.text import Text

    groups = [list(group) for _, group in groupby(report.measurements, key=_place)]
    heading = Text(f"Milliseconds of one forward pass of {visible(name)}", style="bold")
    return Group(heading, *map(_table, groups), Text(_sizes(report), style="dim"))


def _place(each: Measurement) -> str:
    return f"{each.backend}, {name_place(each.device, each.threads)}, {each.dtype}"


def name_place(device: str, threads: int) -> str:
    """`GPU`, or `CPU (2 threads)`."""
    return "GPU" if device == "cuda" else f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def _table(group: Sequence[Measurement]) -> Table:
    from rich.table import Table

    table = Table(title=_place(group[0]), title_justify="left")
    compared = group[0].teacher_median_ms is not None
    for column in ("batch", "tokens", "median", "p90", "p99", "runs", *(("teacher", "speed-up") if compared else ())):
        table.add_column(column, justify="right", style="bold" if column in ("median", "speed-up") else None)
    for each in group:
        table.add_row(*_cells(each))
    return table


def _cells(each: Measurement) -> list[str]:
    milliseconds = (each.median_ms, each.p90_ms, each.p99_ms)
    cells = [f"{each.batch_size}", f"{each.seq_len}", *(_round(value) for value in milliseconds), f"{each.runs}"]
    if each.teacher_median_ms is not None:
        cells += [_round(each.teacher_median_ms), f"{each.speedup:.2f}x"]
    return cells


def _round(milliseconds: float) -> str:
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 1000 else 0
    return f"{milliseconds:.{digits}f}"


def _sizes(report: LatencyReport) -> str:
    lines = [f"student: {report.student_size}"]
    if report.teacher_size is not None:
        lines.append(f"teacher: {report.teacher_size}")
    if report.onnx_max_error is not None:
        lines.append(f"ONNX Runtime differs from PyTorch by at most {report.onnx_max_error:.1e}")
    return "\n".join(lines)
