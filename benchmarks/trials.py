"""Shared by benchmarks that train many students: train and measure one, and keep its result.

A result is one JSON file in a folder of its own, with the settings that it belongs to. It is not computed again. A
folder without a result was left by a run that was stopped, and is started afresh.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import OWN_MEASURE, own_value, run

from student_train.evaluate.fidelity.records import FidelityReport
from student_train.run_files import METRICS_NAME, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULT_NAME = "result.json"
TARGETS = {"mha": "attention", "hs": "hidden", "od": "logits"}
LABELS = {"mha": "relation KL, sum of three", "hs": "hidden NMSE, mean", "od": "output KL"}
_START_UP = 10


def kept(
    folder: Path, settings: Mapping[str, Any], compute: Callable[[Path], dict[str, Any]], *, finished: str
) -> dict[str, Any]:
    """What `compute` found in `folder`, now or in an earlier run of the same settings; told as `finished`."""
    record = folder / RESULT_NAME
    wanted = json.loads(json.dumps(settings))
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if found["settings"] != wanted:
            names = sorted(found["settings"].keys() | wanted.keys())
            differing = [name for name in names if found["settings"].get(name) != wanted.get(name)]
            changes = "; ".join(f"{n}: {found['settings'].get(n)!r} there, {wanted.get(n)!r} now" for n in differing)
            raise SystemExit(
                f"{str(record)!r} is of other settings ({changes}): results of both would stand side by side; give "
                "another --out"
            )
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = {"settings": wanted, **compute(folder)}
    write_result(folder, found)
    print(finished, file=sys.stderr, flush=True)
    return found


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    temporary = folder / "result.tmp"
    temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(folder / RESULT_NAME)


def train_student(store: Path, out: Path, *flags: str) -> float | None:
    """Train by `kdtrain`, validating before the first step and after the last; returns tokens a second.

    Checkpoints are deleted: nothing goes on from them.
    """
    run("kdtrain", "--cache", str(store), "--out", str(out), *flags)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return median_speed(read_records(out / METRICS_NAME))


def median_speed(records: list[dict[str, Any]]) -> float | None:
    """Tokens a second of the median step, the first ones left out; None of no steps."""
    steps = [record for record in records if "tokens" in record]
    tokens = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *steps], steps, strict=False)]
    speeds = [count / step["seconds"] for count, step in zip(tokens, steps, strict=True)]
    return statistics.median(speeds[min(_START_UP, len(speeds) // 2) :]) if speeds else None


def figures(report: FidelityReport) -> dict[str, float]:
    """The measure of each method, by method, as far as the student and the cache allow them."""
    lines = report.lines()
    found = {}
    for method in OWN_MEASURE:
        try:
            found[method] = own_value(method, lines)
        except StopIteration:
            continue
    return found


def log_bytes(axes: Axes, label: str) -> None:
    """Bytes on a logarithmic axis, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
