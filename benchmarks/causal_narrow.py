r"""What a smaller decoder starts from: uniform or chosen layers, a sliced width, noise; before and after training.

Every start is a shape and an `--init`, written SHAPE@INIT. From one store of 24 draws a position each student is made
by `kdtrain --method od --steps 0`, then trained by `od` for the same steps on the same rows in the same order. Before
and after, on rows that none was trained on, it is compared with the exact teacher: KL(teacher || student) over the
whole vocabulary, top-1 agreement, and its perplexity beside the teacher's. Seconds of a start are those of making it.

    python benchmarks/causal_narrow.py --teacher DIR --corpus FILE --out narrow \
        --starts 15x576@teacher:uniform,15x576@teacher:importance,30x384:6:1024:2@auto,30x384:6:1024:2@random

A start whose result is in --out is not computed again. A teacher of 4 x 128 takes a few minutes on two CPU cores; for
SmolLM2-135M choosing 15 of 30 layers takes some minutes on one, slicing as many.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from causal_quality import Configuration as Training
from causal_quality import batch_rows, build_store, flags_of, measure
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

STORE = "draws-24"
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
    store, starts = build_store(STORE, options), {}
    for number, start in enumerate(options.starts):
        shape, _, init = start.partition("@")
        flags = {**flags_of(Training(store=STORE, flags={"method": "od"}), options, options.seed), "student": shape}
        compute = partial(compare, {**flags, "init": init}, store, options, teacher)
        folder = Path(options.out) / "runs" / f"{number}-{start.replace(':', '-')}"
        starts[start] = kept(folder, {**flags, "init": init}, compute, finished=f"{start}: done")
    report(starts, options)
    chosen = {
        name: value for name, value in vars(options).items() if name not in ("out", "starts", "device", "student")
    }
    print_record("causal_narrow", **chosen, starts=starts)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--out", required=True, help="folder for store and results")
    parser.add_argument("--starts", default=",".join(STARTS), help="SHAPE@INIT, the default for a teacher of 4 x 128")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=16, help="rows to measure on")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.starts = split_starts(options.starts)
    options.student = ""  # each start has its own
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


def compare(
    flags: dict[str, Any], store: Path, options: argparse.Namespace, teacher: Teacher, folder: Path
) -> dict[str, Any]:
    """Figures of one start, before and after its training. Students are deleted once they are measured."""
    reader, untrained, trained = CacheReader.open(store), folder / "untrained", folder / "trained"
    began = time.perf_counter()
    train(TrainSettings(**{**flags, "steps": 0}, out=str(untrained)))
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "description": json.loads((untrained / PROVENANCE).read_text(encoding="utf-8"))["student"]["description"],
        "before": measure(untrained, reader, options.held_out, teacher, options.device),
    }
    if options.steps:
        train(TrainSettings(**{**flags, "student": str(untrained), "init": "auto"}, out=str(trained)))
        found["after"] = measure(trained, reader, options.held_out, teacher, options.device)
        shutil.rmtree(trained)
    shutil.rmtree(untrained)
    return found


def report(starts: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.steps} steps of {batch_rows(options) * options.seq_len:,} tokens; held-out rows")
    for name in ("", "KL before", "after", "perplexity before", "after", "teacher's", "top-1 after", "s to make"):
        table.add_column(name, justify="right" if name else "left")
    for start, found in starts.items():
        before, after = found["before"], found.get("after", found["before"])
        table.add_row(
            start,
            f"{before['kl']:.3f}",
            f"{after['kl']:.3f}",
            f"{before['perplexity']:.1f}",
            f"{after['perplexity']:.1f}",
            f"{after['teacher_perplexity']:.1f}",
            f"{after['agreement']:.3f}",
            f"{found['seconds']:.0f}",
        )
    Console(file=sys.stderr, width=120).print(table)


if __name__ == "__main__":
    main()
