"""What a comparison says of int8 files that `kdeval export` made: size, speed, and how near they are to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from student_train.evaluate.compare.rows import Row
from student_train.evaluate.onnx.records import OnnxFile
from student_train.evaluate.run_records import RunRecords


@dataclass(frozen=True, kw_only=True)
class Int8Measures:
    """Of a row's int8 files, of each run the one nearest to its model, mean over the runs; None is what none tells.

    `speedup` is over the model itself in PyTorch, one row of text at a time.
    """

    bytes: float | None = None
    milliseconds: float | None = None
    speedup: float | None = None
    cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


def int8_measures(row: Row) -> Int8Measures:
    """Of one row."""
    return Int8Measures(
        bytes=_mean(row, lambda file: float(file.bytes)),
        milliseconds=_mean(row, lambda file: file.milliseconds(1)),
        speedup=row.mean(_speedup),
        cosine=_mean(row, lambda file: file.cosine),
    )


def int8_output(run: RunRecords) -> str | None:
    """What a run's int8 files give; None where it has none."""
    return None if run.onnx is None or run.onnx.int8 is None else run.onnx.output


def int8_timing(run: RunRecords) -> str | None:
    """How a run's int8 file was timed on one row of text, and where."""
    file = None if run.onnx is None else run.onnx.int8
    timing = None if file is None else next((each for each in file.timings if each.batch_size == 1), None)
    if run.onnx is None or timing is None:
        return None
    return f"{timing.seq_len} tokens, {timing.threads} CPU threads, {run.onnx.hardware}"


def int8_rows(run: RunRecords) -> str | None:
    """On which text a run's int8 files were compared with the model."""
    report = run.onnx
    if report is None or report.int8 is None or report.int8.cosine is None:
        return None
    return f"{report.rows} rows of {report.fingerprints.get('cache', '–')[:12]}"


def _mean(row: Row, measure: Callable[[OnnxFile], float | None]) -> float | None:
    def of_run(run: RunRecords) -> float | None:
        file = None if run.onnx is None else run.onnx.int8
        return None if file is None else measure(file)

    return row.mean(of_run)


def _speedup(run: RunRecords) -> float | None:
    if run.onnx is None or run.onnx.int8 is None:
        return None
    whole, small = run.onnx.files[0].milliseconds(1), run.onnx.int8.milliseconds(1)
    return None if whole is None or small is None else whole / small
