"""How far each method brings a student in a few hundred steps, on rows that it was not trained on.

For every method: the untrained student (`kdtrain --steps 0`), the trained one (`kdtrain --steps N`), and the fidelity
of both (`kdeval fidelity`), all by the real commands from one store. A method's own measure is what it minimises: the
sum of the three relation KLs for mha, the mean hidden NMSE for hs, the output KL for od.

    kdcache build --teacher DIR --corpus FILE --seq-len 128 --max-rows 2000
    python benchmarks/methods.py --cache cache.zarr --out runs

On two CPU cores the default takes about ten minutes a method. Flags that this script does not know go to kdtrain.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import print_record
from rich.console import Console

from student_train.evaluate.fidelity.records import FidelityReport, Measure, fidelity_table
from student_train.evaluate.report.training_plot import plot_training
from student_train.run_files import METRICS_NAME, read_records

OWN_MEASURE = {"mha": "relation KL, sum", "hs": "hidden NMSE, mean", "od": "output KL"}


def main() -> None:
    options, further = parse_options()
    out = Path(options.out)
    results = {}
    for method in options.methods.split(","):
        train = ["--cache", options.cache, "--method", method, "--batch-size", str(options.batch_size)]
        train += ["--init", options.init, *further]
        untrained, student = (str(out / f"{method}-{state}") for state in ("untrained", "trained"))
        run("kdtrain", *train, "--steps", "0", "--out", untrained)
        started = time.monotonic()
        run("kdtrain", *train, "--steps", str(options.steps), "--out", student)
        seconds = time.monotonic() - started
        reports = {"untrained": measure(untrained, options.cache), "trained": measure(student, options.cache)}
        title = f"{method}: {options.steps} steps of {options.batch_size} rows, --init {options.init}"
        Console().print(f"\n{title}", highlight=False)
        Console().print(fidelity_table(reports))
        plot_training(read_records(Path(student) / METRICS_NAME), reports, out / f"{method}.png", title=title)
        results[method] = describe(method, reports, seconds)
    print_record("methods", steps=options.steps, batch_size=options.batch_size, init=options.init, methods=results)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="cache.zarr")
    parser.add_argument("--out", required=True, help="folder for the students, their reports and pictures")
    parser.add_argument("--methods", default="mha,hs,od")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--init", default="random")
    return parser.parse_known_args()


def run(name: str, *arguments: str) -> str:
    """Run one of our commands, its progress on our standard error; returns its standard output."""
    script = Path(sys.executable).parent / name
    print(f"$ {shlex.join([name, *arguments])}", file=sys.stderr, flush=True)
    return subprocess.run([str(script), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(student: str, cache: str) -> FidelityReport:
    return FidelityReport.from_json(
        json.loads(run("kdeval", "fidelity", "--student", student, "--cache", cache, "--json"))
    )


def describe(method: str, reports: dict[str, FidelityReport], seconds: float) -> dict[str, Any]:
    """Every measure before and after, and how much better the method's own became."""
    before, after = (report.lines() for report in reports.values())
    own_before, own_after = own_value(method, before), own_value(method, after)
    return {
        "own_measure": OWN_MEASURE[method],
        "untrained": own_before,
        "trained": own_after,
        "better_by": own_before / own_after,
        "seconds": round(seconds, 1),
        "reports": {name: report.to_json() for name, report in reports.items()},
    }


def own_value(method: str, lines: dict[str, Measure]) -> float:
    # a single pair of layers has no mean of its own
    wanted = (OWN_MEASURE[method], "hidden NMSE" if method == "hs" else OWN_MEASURE[method])
    return next(measure.value for label in wanted for measure in lines.values() if measure.label == label)


if __name__ == "__main__":
    main()
