"""What a student of another width starts from: noise, the teacher's first components, or the teacher sliced and fitted.

For every shape and start: the fidelity of the untrained student (`kdtrain --method od --steps 0`, so that it has a
masked-LM head), and of the student after a short training by every method, on held-out rows, all by the real commands
from one store. `first components` cuts every matrix of the copied teacher down to its leading rows and columns; it is
made here, for comparison only.

    kdcache build --teacher DIR --corpus FILE --seq-len 128 --max-rows 600 --layers all
    python benchmarks/initialise.py --cache cache.zarr --out runs

On two CPU cores the default takes about twenty minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from methods import measure, run
from record import print_record
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from student_train.evaluate.fidelity.records import FidelityReport
from student_train.students.initialise import find_layers
from teacher_cache.contract.layers import uniform_layers
from teacher_cache.read.pool import open_caches

STARTS = ("random", "first components", "sliced")
FIGURES = {"relation KL": "relation KL, sum", "hidden NMSE": "hidden NMSE, mean", "output KL": "output KL"}


def main() -> None:
    options = parse_options()
    students = {shape: compare(shape, options) for shape in options.shapes.split(",")}
    for shape, starts in students.items():
        Console().print(as_table(shape, starts, options.steps))
    print_record("initialise", steps=options.steps, batch_size=options.batch_size, students=students)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="cache.zarr")
    parser.add_argument("--out", required=True, help="folder for the students")
    parser.add_argument("--shapes", default="3x192:6,3x256:8")
    parser.add_argument("--methods", default="mha,hs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def compare(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of every start: untrained, and after each method."""
    place = Path(options.out) / shape.replace(":", "-")
    settings = ["--cache", options.cache, "--batch-size", str(options.batch_size), "--valid-share", "0.2"]
    figures: dict[str, Any] = {}
    for start in STARTS:
        folder = place / start.replace(" ", "-")
        if start == "first components":
            cut_teacher(options.cache, noise=place / "random" / "untrained", out=place / "cut")
            given = ["--student", str(place / "cut")]
        else:
            given = ["--student", shape, "--init", "random" if start == "random" else "auto"]
        stages = {"untrained": ("od", 0), **{method: (method, options.steps) for method in options.methods.split(",")}}
        for stage, (method, steps) in stages.items():
            out = str(folder / stage)
            run("kdtrain", *settings, *given, "--method", method, "--steps", str(steps), "--out", out)
            figures.setdefault(start, {})[stage] = read_figures(measure(out, options.cache))
    return figures


def cut_teacher(cache: str, *, noise: Path, out: Path) -> None:
    """A student of the sizes of the one in `noise`, of leading rows and columns of the teacher's matrices."""
    teacher = AutoModelForMaskedLM.from_pretrained(open_caches([cache]).teacher_folder())
    student: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(noise)
    (name, ours), (_, theirs) = (find_layers(model.base_model) for model in (student, teacher))
    for number, layer in enumerate(uniform_layers(len(theirs), len(ours))):
        cut(ours[number], theirs[layer - 1])
    cut(student, teacher, without=f".{name}.")
    student.save_pretrained(out)


@torch.no_grad()
def cut(target: nn.Module, source: nn.Module, without: str | None = None) -> None:
    whole = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if without is None or without not in name:
            parameter.copy_(whole[name][tuple(slice(size) for size in parameter.shape)])


def read_figures(report: FidelityReport) -> dict[str, float]:
    measures = {line.label: line.value for line in report.lines().values()}
    return {name: measures[label] for name, label in FIGURES.items() if label in measures}


def as_table(shape: str, starts: dict[str, Any], steps: int) -> Table:
    table = Table("trained", "measure", *STARTS, title=shape)
    for stage, figures in starts[STARTS[0]].items():
        for name in figures:
            trained = "not at all" if stage == "untrained" else f"{stage}, {steps} steps"
            table.add_row(trained, name, *(f"{starts[start][stage][name]:.3f}" for start in STARTS))
    return table


if __name__ == "__main__":
    main()
