"""What does each way to store targets cost in bytes and speed, and how good are the students trained from it?

For every way to store the targets of a method (precision, relation mode, form of the distribution, layers) a store with
the targets of that method alone is built, read and trained from, and the student is measured:

- bytes: of all arrays, per token of padded rows, in total and by target; constants and the teacher's copy do not count;
- build: tokens a second from the first pass of the teacher to the finished store, calibration included, which a large
  corpus does not notice;
- read: tokens a second of the training loader over the whole store, all its targets decoded, the median of three passes
  from the page cache;
- train: tokens a second of the median step of `kdtrain`, the first ones left out;
- fidelity: of the trained student against one reference store of float16, all layers and 512 ids a position, on rows
  that all trainings hold out: relation KL for mha, hidden NMSE for hs, output KL for od;
- with --finetune-train and --finetune-dev, the score of the student fine-tuned by `kdeval finetune`.

For comparison, mha and hs are also trained with the teacher in the loop, on the same batches. `matrix` relations in
float16 are the naive way to store attention.

    python benchmarks/storage_speed.py --teacher DIR --corpus FILE --out storage

Every student is trained once, from the same start on the same batches, so that variants differ in their targets alone
(a `--student` narrower than the teacher starts from maps fitted to each variant's own targets).
How much of a difference another order of the rows would make is not measured here.

A variant whose result is in --out is not computed again; its store is deleted once it is measured. Pictures go to --out
too. Flags that this script does not know go to kdtrain. Variants run one after another, so their speeds can be compared
only if the machine does nothing else; `train.py` compares online with cached training in turns.

On two CPU cores the default takes about an hour and 4 GB of disk, with --steps 40 25 minutes;
fine-tuning 20 to 40 more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from methods import measure, run
from online import train_online
from record import print_record
from rich.console import Console
from storage_speed_report import plot_fidelity, plot_speed, tabulate
from store_figures import build, check_rows, measure_store
from trials import TARGETS, figures, kept, median_speed, train_student, write_result

from cli.options import parse
from student_train.settings import TrainSettings
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.layers import default_relation_heads
from teacher_cache.read.reader import CacheReader

PRECISIONS = ("float16", "int8", "int4", "nmse:1e-3", "nmse:1e-2", "nmse:1e-1")
REFERENCE = {"targets": "logits,hidden,attention", "layers": "all", "precision": "float16", "k": 512}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to store the targets of a method; `kind` is what it shares a colour with. Without `build`: none."""

    method: str
    kind: str
    label: str
    build: Mapping[str, Any] | None = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.label if self.label.startswith(self.kind) else f"{self.kind}, {self.label}"

    @property
    def folder(self) -> str:
        return f"{self.method}-{self.title}".replace(", ", "-").replace(" ", "-").replace(":", "")


def list_variants(student: str, teacher_width: int) -> list[Variant]:
    layers, width = map(int, student.split("x"))
    needed = f"uniform:{layers}+last"
    chosen = [
        Variant(method="hs", kind="needed layers", label=one, build={"layers": needed, "precision": one})
        for one in PRECISIONS
    ]
    chosen += [
        Variant(method="hs", kind="all layers", label=one, build={"layers": "all", "precision": one})
        for one in ("float16", "nmse:1e-2")
    ]
    # heads that `kdtrain` takes by itself: the fidelity of all is measured in the same ones
    heads = {"relation_heads": default_relation_heads(teacher_width, width)}
    modes = {"hidden": (PRECISIONS, {}), "qkv": (("float16", "nmse:1e-2"), {}), "matrix": (("float16",), heads)}
    for mode, (precisions, more) in modes.items():
        chosen += [
            Variant(method="mha", kind=mode, label=one, build={"relations": mode, "precision": one, **more})
            for one in precisions
        ]
    chosen += [
        Variant(method="od", kind=form, label=f"{form} {entries}", build={"logits": form, "k": entries})
        for form, entries in (("topk", 64), ("topk", 16), ("sample", 50))
    ]
    return chosen + [Variant(method=method, kind="online", label="online", build=None) for method in ("mha", "hs")]


def main() -> None:
    options, further = parse_options()
    out = Path(options.out)
    reference, store_settings = out / "reference.zarr", given_to_build(options)
    console = Console(stderr=True, width=130)
    build(BuildSettings(**store_settings, **REFERENCE, out=str(reference)))
    results = []
    for variant in list_variants(options.student, CacheReader.open(reference).manifest.teacher.hidden_size):
        if variant.method not in options.methods.split(","):
            continue
        flags = train_flags(variant.method, options, further)
        found = kept(
            out / variant.folder,
            {**store_settings, "build": variant.build, "train": flags},
            partial(try_variant, variant, store_settings, flags, reference),
            finished=f"{variant.folder} done",
        )
        if options.finetune_train:
            add_score(out / variant.folder, found, options)
        named = {name: getattr(variant, name) for name in ("method", "kind", "label", "title")}
        results.append(named | {name: value for name, value in found.items() if name != "settings"})
    console.print(tabulate(results, title=f"{options.rows} rows x {options.seq_len} tokens, {options.steps} steps"))
    plot_fidelity(results, out / "storage-fidelity.png")
    plot_speed(results, out / "storage-speed.png")
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "teacher", "corpus")}
    print_record("storage_speed", **chosen, further=further, variants=results)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--out", required=True, help="folder for results, students and pictures")
    parser.add_argument("--methods", default="hs,mha,od")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--student", default="3x384", help="LAYERSxWIDTH")
    parser.add_argument(
        "--valid-share", type=float, default=0.2, help="share of the rows that students are measured on"
    )
    parser.add_argument("--finetune-task", default="sst2")
    parser.add_argument("--finetune-train", help="examples to fine-tune on; goes with --finetune-dev")
    parser.add_argument("--finetune-dev")
    parser.add_argument("--finetune-rows", type=int, default=2000)
    parser.add_argument("--finetune-seeds", type=int, default=3)
    parser.add_argument("--finetune-lr", default="1e-4", help="as `kdeval finetune --lr`; several: the best counts")
    options, further = parser.parse_known_args()
    if bool(options.finetune_train) != bool(options.finetune_dev):
        parser.error("--finetune-train and --finetune-dev go together")
    return options, further


def given_to_build(options: argparse.Namespace) -> dict[str, Any]:
    """What all stores share: the same rows, and the same masks, in the same order."""
    return {
        "teacher": options.teacher,
        "corpus": tuple(options.corpus),
        "seq_len": options.seq_len,
        "max_rows": options.rows,
    }


def train_flags(method: str, options: argparse.Namespace, further: Sequence[str]) -> list[str]:
    flags = ["--method", method, "--student", options.student, "--steps", str(options.steps)]
    flags += ["--batch-size", str(options.batch_size), "--valid-share", str(options.valid_share)]
    return [*flags, "--valid-every", str(options.steps), *further]


def try_variant(
    variant: Variant, store_settings: Mapping[str, Any], flags: Sequence[str], reference: Path, folder: Path
) -> dict[str, Any]:
    """Everything but the score: store, speeds, student, fidelity."""
    student = folder / "student"
    if variant.build is None:
        argv = ["--cache", str(reference), "--out", str(student), *flags]
        steps = train_online(parse(TrainSettings, argv, "kdtrain"))
        found: dict[str, Any] = {"bytes_per_token": {}, "total_bytes_per_token": 0.0}
        found["train_tokens_per_second"] = median_speed(steps)
    else:
        store = folder / "cache.zarr"
        settings = BuildSettings(**store_settings, **variant.build, targets=TARGETS[variant.method], out=str(store))
        found = measure_store(settings)
        check_rows(store, reference)
        found["train_tokens_per_second"] = train_student(store, student, *flags)
        shutil.rmtree(store)
    report = measure(str(student), str(reference))
    return {**found, "fidelity": figures(report), "held_out_rows": report.rows}


def add_score(folder: Path, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Fine-tune the student and keep its score with the result, unless it is there."""
    files = ["--train-file", options.finetune_train, "--dev-file", options.finetune_dev]
    flags = ["--task", options.finetune_task, *files, "--train-rows", str(options.finetune_rows)]
    flags += ["--seeds", str(options.finetune_seeds), "--lr", options.finetune_lr]
    flags += ["--batch-size", "8", "--epochs", "1", "--max-length", "64"]
    if found.get("finetune", {}).get("flags") == flags:
        return
    record = json.loads(run("kdeval", "finetune", "--student", str(folder / "student"), *flags, "--json"))
    names = ("task", "metric", "scores", "mean", "sd")
    found["finetune"] = {"flags": flags, **{name: record[name] for name in names}}
    write_result(folder, found)
    print(f"{folder.name}: {record['metric']} {record['mean']:.4f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
