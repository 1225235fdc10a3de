r"""What brings a smaller decoder nearest to its teacher: which start, then which method? KL and perplexity, held out.

A start is a shape and an `--init`, written SHAPE@INIT: uniform or chosen layers, a sliced width, noise. Each is made
once, by `kdtrain --steps 0`. From each of them every method is then trained for the same steps on the same rows, all
from one store: 24 draws a position, hidden states after a third, two thirds and all of the teacher's layers, attention
of the last layer but one. Methods are those of `kdtrain`, with these names for what else is told:

- `od+mha-full`: relations to all positions of a document, where `od+mha` has those that the model sees;
- `mha-od`, `mha-full-od`: one half of the steps by `mha`, the other by `od`, on rows in another order.

Before and after, on rows that none was trained on, a student is compared with the exact teacher: KL(teacher || student)
over the whole vocabulary, top-1 agreement, and its perplexity beside the teacher's. Seeds decide the order of the rows.

    python benchmarks/causal_methods.py --teacher DIR --corpus FILE --out methods \
        --starts 15x576@auto,30x384:6:1024:2@auto --methods lm,od,od+mha --seeds 2

What is in --out is not computed again; once its store and starts are made, two processes may share it if each has other
--starts. A teacher of 4 x 128 takes some minutes on two CPU cores; for SmolLM2-135M choosing 15 of 30 layers takes some
minutes, slicing as many, and a training of 20 steps of 512 tokens one to two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from causal_quality import batch_rows, build_rows, measure
from record import print_record
from rich.console import Console
from rich.table import Table
from trials import kept

from student_train.run_files import PROVENANCE
from student_train.settings import TrainSettings
from student_train.train.train import train
from teacher_cache.models.families import quiet_transformers
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher

METHODS: dict[str, tuple[dict[str, str], ...]] = {
    "lm": ({"method": "lm"},),
    "od": ({"method": "od"},),
    "od+lm": ({"method": "od+lm"},),
    "od+hs": ({"method": "od+hs"},),
    "od+mha": ({"method": "od+mha", "relation_mask": "causal"},),
    "od+mha-full": ({"method": "od+mha", "relation_mask": "full"},),
    "mha-od": ({"method": "mha", "relation_mask": "causal"}, {"method": "od"}),
    "mha-full-od": ({"method": "mha", "relation_mask": "full"}, {"method": "od"}),
}
"""What `kdtrain` is told, one training after another."""
STARTS = (
    "2x128@teacher:uniform",
    "2x128@teacher:importance",
    "2x128@random",
    "4x64:2:170:1@auto",
    "4x64:2:170:1@random",
)


def main() -> None:
    options = parse_options()
    with quiet_transformers():
        teacher = Teacher.load(options.teacher, device=options.device)
    teacher.start()
    store = build_store(teacher, options)
    starts = {start: make_start(start, store, teacher, options) for start in options.starts}
    measured: dict[str, dict[str, list[dict[str, float]]]] = {start: {} for start in starts}
    for seed, start, method in product(range(options.seeds), starts, options.methods):
        stages = stages_of(method, start, seed, store, teacher, options)
        compute = partial(train_and_measure, stages, store, teacher, options)
        folder = Path(options.out) / "runs" / f"{name_of(start)}-{method}-seed{seed}"
        settings = {"stages": [{**one, "cache": None, "student": None} for one in stages]}
        found = kept(folder, settings, compute, finished=f"{start}, {method}, seed {seed}: done")
        measured[start].setdefault(method, []).append(found["after"])
    for start, found in starts.items():
        found["methods"] = {method: summarise(each) for method, each in measured[start].items()}
    report(starts, options)
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "starts", "device")}
    print_record("causal_methods", **chosen, starts=starts)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--out", required=True, help="folder for store, starts and results")
    parser.add_argument("--starts", default=",".join(STARTS), help="SHAPE@INIT, the default for a teacher of 4 x 128")
    parser.add_argument("--methods", default="od", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=16, help="rows to measure on")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.starts, options.methods = split_starts(options.starts), options.methods.split(",")
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--methods: there is no {', '.join(sorted(unknown))}, only {', '.join(METHODS)}")
    return options


def split_starts(text: str) -> list[str]:
    """SHAPE@INIT,SHAPE@INIT: what follows a comma and has no @ belongs to the layers before it."""
    starts: list[str] = []
    for part in text.split(","):
        if "@" in part:
            starts.append(part)
        else:
            starts[-1] += f",{part}"
    return starts


def name_of(start: str) -> str:
    """Of a folder."""
    return start.replace(":", "-").replace(",", "-")


def thirds(layers: int) -> list[int]:
    """After a third of the layers, two thirds and all."""
    return [max(1, layers * part // 3) for part in (1, 2, 3)]


def build_store(teacher: Teacher, options: argparse.Namespace) -> Path:
    """The store of all methods, unless it is there."""
    layers = ",".join(map(str, sorted(set(thirds(teacher.record.layers)))))
    return build_rows("cache", options, targets="logits,hidden,attention", layers=layers, logits="sample", k=24)


def training_flags(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = options.steps * batch_rows(options)
    return {
        "cache": (str(store),),
        "batch_size": batch_rows(options),
        "lr": options.lr,
        "valid_share": options.held_out / (rows + options.held_out),
        "device": options.device,
    }


def make_start(start: str, store: Path, teacher: Teacher, options: argparse.Namespace) -> dict[str, Any]:
    """The student as it begins, which stays in its folder, and how far it is from the teacher."""
    shape, _, init = start.partition("@")
    flags = {**training_flags(store, options), "method": "od", "steps": 0, "student": shape, "init": init}

    def compute(folder: Path) -> dict[str, Any]:
        began, student = time.perf_counter(), folder / "student"
        train(TrainSettings(**flags, out=str(student)))
        return {
            "seconds": time.perf_counter() - began,
            "description": json.loads((student / PROVENANCE).read_text(encoding="utf-8"))["student"]["description"],
            "before": measure(student, CacheReader.open(store), options.held_out, teacher, options.device),
        }

    folder = Path(options.out) / "starts" / name_of(start)
    return kept(folder, {**flags, "cache": None}, compute, finished=f"{start}: made")


def stages_of(
    method: str, start: str, seed: int, store: Path, teacher: Teacher, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The flags of each training, all steps of them together being as many as asked for."""
    student = Path(options.out) / "starts" / name_of(start) / "student"
    depth = int(start.partition("x")[0])
    mapping = dict(zip(thirds(depth), thirds(teacher.record.layers), strict=True))
    stages, left = [], options.steps
    for number, told in enumerate(METHODS[method]):
        steps = left // (len(METHODS[method]) - number)
        left -= steps
        flags = {**training_flags(store, options), **told, "steps": steps, "valid_every": max(1, steps)}
        if "hs" in told["method"]:
            flags["mapping"] = ",".join(f"{mine}:{teachers}" for mine, teachers in mapping.items())
        # a second training would read the rows of the first once more
        stages.append({**flags, "seed": seed + 1000 * number, "student": str(student), "init": "auto"})
    return stages


def train_and_measure(
    stages: list[dict[str, Any]], store: Path, teacher: Teacher, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Students are deleted once they are measured."""
    student = Path(stages[0]["student"])
    for number, flags in enumerate(stages):
        trained = folder / f"student-{number}"
        train(TrainSettings(**{**flags, "student": str(student)}, out=str(trained)))
        student = trained
    found = measure(student, CacheReader.open(store), options.held_out, teacher, options.device)
    for number in range(len(stages)):
        shutil.rmtree(folder / f"student-{number}")
    return {"after": found}


def summarise(measured: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, and the KL of each of them."""
    means = {name: statistics.fmean(one[name] for one in measured) for name in ("kl", "agreement", "perplexity")}
    return {**means, "kls": [one["kl"] for one in measured]}


def report(starts: dict[str, Any], options: argparse.Namespace) -> None:
    trained = f"{options.steps} steps of {batch_rows(options) * options.seq_len:,} tokens"
    table = Table(title=f"{trained}, seeds: {options.seeds}; held-out rows")
    for name in ("", "", "KL, nats", "of each seed", "top-1", "perplexity", "teacher's", "s to make"):
        table.add_column(name, justify="right" if name else "left")
    for start, found in starts.items():
        rows = {"untrained": {**found["before"], "kls": []}, **found["methods"]}
        for method, one in rows.items():
            table.add_row(
                start if method == "untrained" else "",
                method,
                f"{one['kl']:.4f}",
                " ".join(f"{kl:.4f}" for kl in one["kls"]),
                f"{one['agreement']:.3f}",
                f"{one['perplexity']:.1f}",
                f"{found['before']['teacher_perplexity']:.1f}",
                f"{found['seconds']:.0f}" if method == "untrained" else "",
            )
    Console(file=sys.stderr, width=120).print(table)


if __name__ == "__main__":
    main()
