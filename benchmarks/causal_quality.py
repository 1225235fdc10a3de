"""Which form of a causal teacher's distribution trains a student best? Held-out KL to the exact teacher, perplexity.

The same student (some of the teacher's layers, copied) is trained for the same steps on the same rows, in the same
order, from each of these:

- draws of 8, 24 and 50 a position, and the 64 most probable ids with their tail and renormalised: `od` from a cache;
- the next tokens alone: `lm`;
- the teacher in the loop, all of whose distribution is learned: `online`, the ceiling. Engine and batches are those of
  `od`.

On rows that none was trained on, each student is then compared with the exact teacher: KL(teacher || student) over the
whole vocabulary and the share of positions at which both name the same most probable id, mean over all positions that
have a next token; and its perplexity there, beside the teacher's.

    python benchmarks/causal_quality.py --teacher DIR --corpus FILE --student 15x576 --out quality

A configuration whose result is in --out is not computed again, and what is trained from a cache goes on from the
checkpoint that SIGTERM or Ctrl-C leaves, so that the script may be stopped at any time; the line that it ends in has
all results that are there. `--only draws-24,online` computes some, also beside a process that computes others, once the
store that both read is built. The teacher's final states of every row are kept in --out (0.6 MB a row of 256 tokens at
a width of 576), for all stores and `online`. `--steps 20 --tokens 512` is a small check.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import print_record
from remembered import remembered_finals
from rich.console import Console
from rich.table import Table
from store_figures import build
from torch import Tensor, nn
from trials import RESULT_NAME, kept

from student_train.data.split import split_rows
from student_train.engine.engine import full_precision_weights, running_engine
from student_train.evaluate.fidelity.fidelity import run_student
from student_train.evaluate.load import load_student
from student_train.losses.sums import LossSum
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from student_train.settings import TrainSettings
from student_train.train.best import write_student
from student_train.train.feed import Feed
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import Progress
from student_train.train.prepare import prepare_run
from student_train.train.train import train
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest
from teacher_cache.contract.targets import View
from teacher_cache.models.families import quiet_transformers
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher

STORES: dict[str, dict[str, Any]] = {
    "draws-8": {"logits": "sample", "k": 8},
    "draws-24": {"logits": "sample", "k": 24},
    "draws-50": {"logits": "sample", "k": 50},
    "top-64": {"logits": "topk", "k": 64},
}
AT_ONCE = 256
"""Positions whose logits of both models exist at a time."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way to train: what `kdtrain` is told, from which store, or with the teacher in the loop; in how many seeds."""

    store: str
    flags: dict[str, Any]
    online: bool = False
    matters: bool = False


CONFIGURATIONS = {
    "untrained": Configuration(store="draws-24", flags={"method": "od", "steps": 0}),
    "draws-24": Configuration(store="draws-24", flags={"method": "od"}, matters=True),
    # rows and next tokens are in every store; this one is read by two more
    "online": Configuration(store="top-64", flags={"method": "od"}, online=True, matters=True),
    "lm": Configuration(store="top-64", flags={"method": "lm"}),
    "top-64-tail": Configuration(store="top-64", flags={"method": "od"}),
    "draws-8": Configuration(store="draws-8", flags={"method": "od"}),
    "draws-50": Configuration(store="draws-50", flags={"method": "od"}),
    "top-64-renormalised": Configuration(store="top-64", flags={"method": "od", "topk_loss": "renormalise"}),
}
"""In the order in which they are computed, so that the first ones say most; those that matter in all seeds."""


def main() -> None:
    options = parse_options()
    out, results = Path(options.out), {}
    with quiet_transformers():
        teacher = Teacher.load(options.teacher, device=options.device)
    teacher.start()
    with remembered_finals(out / "finals", options.seq_len):
        for seed in range(options.seeds):
            for name in options.only:
                one = CONFIGURATIONS[name]
                if seed and not one.matters:
                    continue
                settings = {**flags_of(one, options, seed), "online": one.online}
                compute = partial(train_and_measure, one, options, seed, teacher)
                kept(out / "runs" / f"{name}-seed{seed}", settings, compute, finished=f"{name}, seed {seed}: done")
    for name in CONFIGURATIONS:
        paths = sorted((out / "runs").glob(f"{name}-seed*/{RESULT_NAME}"))
        measured = {
            int(path.parent.name.rpartition("seed")[2]): json.loads(path.read_text(encoding="utf-8")) for path in paths
        }
        if measured:
            results[name] = summarise(measured)
    report(results, options)
    sizes = {name: bytes_per_place(out / f"{name}.zarr") for name in STORES if (out / f"{name}.zarr").exists()}
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "only", "device")}
    print_record("causal_quality", **chosen, bytes_per_place=sizes, configurations=results)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--out", required=True, help="folder for stores and results")
    parser.add_argument("--student", default="15x576", help="LAYERSxWIDTH; the teacher's own layers, uniformly chosen")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=32, help="rows to measure on")
    parser.add_argument("--seeds", type=int, default=3, help="for the configurations that matter; one for the others")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="some of these")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(CONFIGURATIONS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, only {', '.join(CONFIGURATIONS)}")
    return options


def batch_rows(options: argparse.Namespace) -> int:
    return max(1, options.tokens // options.seq_len)


def flags_of(one: Configuration, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the student is trained with."""
    rows = options.steps * batch_rows(options)
    return {
        "student": options.student,
        "init": "teacher:uniform",
        "steps": options.steps,
        "batch_size": batch_rows(options),
        "lr": options.lr,
        "seed": seed,
        "valid_share": options.held_out / (rows + options.held_out),
        "valid_every": max(1, options.steps),
        "device": options.device,
        "cache": (str(Path(options.out) / f"{one.store}.zarr"),),
        **one.flags,
    }


def build_store(name: str, options: argparse.Namespace) -> Path:
    """The store of a form, unless it is there."""
    return build_rows(name, options, targets="logits", **STORES[name])


def build_rows(name: str, options: argparse.Namespace, **kept: Any) -> Path:
    """A store, unless it is there: as many rows as are trained on once, and the held-out ones."""
    out = Path(options.out) / f"{name}.zarr"
    build(
        BuildSettings(
            teacher=options.teacher,
            corpus=tuple(options.corpus),
            out=str(out),
            seq_len=options.seq_len,
            max_rows=options.steps * batch_rows(options) + options.held_out,
            block_rows=16,
            device=options.device,
            **kept,
        )
    )
    return out


def train_and_measure(
    one: Configuration, options: argparse.Namespace, seed: int, teacher: Teacher, folder: Path
) -> dict[str, Any]:
    """The student is deleted once it is measured; a training that a signal stopped goes on from its checkpoint."""
    store, student = build_store(one.store, options), Path(options.out) / "students" / folder.name
    settings = TrainSettings(**flags_of(one, options, seed), out=str(student), resume="auto")
    if one.online:
        train_online(settings, teacher)
    elif stopped_by := train(settings).stopped_by:
        raise SystemExit(128 + stopped_by)
    found = measure(student, CacheReader.open(store), options.held_out, teacher, options.device)
    shutil.rmtree(student)
    return found


@dataclass(frozen=True, kw_only=True)
class WholeDistribution:
    """`od` with the teacher in the loop: KL(teacher || student) over the whole vocabulary."""

    teacher: Teacher
    view: View
    counted: Counted = "places"

    @property
    def request(self) -> TargetRequest:
        return TargetRequest(next_tokens=True)

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(head=view == self.view)

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        del projections
        student, rows = outputs[self.view], batch[self.view]
        assert student.head is not None and rows.places is not None
        real_P = rows.places.real_BM().flatten()
        logits_PV = student.head(student.at_places(rows.places)[real_P]).float()
        log_p_PV = teacher_logits(self.teacher, rows).log_softmax(-1)
        return LossSum(Divergence.apply(logits_PV, log_p_PV), real_P.sum())

    def describe(self) -> dict[str, Any]:
        return {"targets": "the whole distribution", "view": self.view}


class Divergence(torch.autograd.Function):
    """sum_P KL(p || softmax(logits)) of log p and logits [P, V]. Autograd would write ten such matrices, not three."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, log_p_PV: Tensor) -> Tensor:
        log_q_PV = logits_PV.log_softmax(-1)
        p_PV = log_p_PV.exp()
        total = (log_p_PV - log_q_PV).mul_(p_PV).sum()
        ctx.save_for_backward(log_q_PV.exp_().sub_(p_PV))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0].mul_(grad), None


@torch.no_grad()
def teacher_logits(teacher: Teacher, batch: TargetBatch) -> Tensor:
    """[P, V]: the exact teacher's at the real places of rows as a store gives them."""
    assert batch.places is not None
    final_BTD = teacher.run(batch.input_ids_BT.long(), batch.length_B, starts_BT=batch.starts_BT).final_BTD
    # these are copies: what inference mode made could not be part of a training step
    final_PD = batch.places.vectors(final_BTD)[batch.places.real_BM().flatten()]
    return teacher.head()(final_PD).float()


def train_online(settings: TrainSettings, teacher: Teacher) -> None:
    """Train a student as `kdtrain` would, from the teacher itself, and export it."""
    # few rows a pass: the whole distribution of all their positions is held several times
    run = prepare_run(replace(settings, micro_batch_size=math.gcd(4, settings.batch_size)))
    run.objective.methods["od"] = WholeDistribution(teacher=teacher, view="plain")
    progress = Progress(quiet=True)
    with (
        running_engine(
            run.model, run.config, device=run.device, warmup=settings.warmup_steps(run.steps), steps=run.steps
        ) as engine,
        closing(run.training_batches(0)) as batches,
    ):
        trainer = Trainer(run, engine, Progression(), None, progress)
        progress.start(total=run.steps, step=0)
        feed = Feed(run, batches, [], progress.skipped)
        for _ in range(run.steps):
            share = feed.next()
            assert share is not None, "nobody sends signals to this feed"
            trainer.backward(share)
        weights = full_precision_weights(run.built.model)
    write_student(run, weights, Path(settings.out), result={"step": run.steps, "online": True})


@torch.inference_mode()
def measure(student: Path, reader: CacheReader, held_out: int, teacher: Teacher, device: str) -> dict[str, float]:
    """Means over all kept places of the held-out rows, in nats; perplexities of both models."""
    loaded = load_student(student, device)
    assert loaded.head is not None
    sums = dict.fromkeys(("kl", "agreement", "nll", "teacher_nll"), 0.0)
    places = 0
    for batch in held_out_batches(reader, held_out, device):
        assert batch.places is not None
        real_P = batch.places.real_BM().flatten()
        final_PD = run_student(loaded, batch, set()).at_places(batch.places)[real_P]
        log_p_PV = teacher_logits(teacher, batch).log_softmax(1)
        label_P1 = batch.places.label_ids_BM.flatten()[real_P].long()[:, None]
        for start in range(0, len(final_PD), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            log_p, log_q = log_p_PV[rows], loaded.head(final_PD[rows]).float().log_softmax(1)
            sums["kl"] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            sums["agreement"] += int((log_p.argmax(1) == log_q.argmax(1)).sum())
            sums["nll"] -= float(log_q.gather(1, label_P1[rows]).sum(dtype=torch.float64))
            sums["teacher_nll"] -= float(log_p.gather(1, label_P1[rows]).sum(dtype=torch.float64))
        places += len(final_PD)
    means = {name: total / places for name, total in sums.items()}
    return {
        "kl": means["kl"],
        "agreement": means["agreement"],
        "perplexity": math.exp(means["nll"]),
        "teacher_perplexity": math.exp(means["teacher_nll"]),
        "places": places,
    }


def held_out_batches(reader: CacheReader, held_out: int, device: str) -> Iterator[TargetBatch]:
    """The rows that a training with this many held out leaves alone, one at a time, without their targets."""
    _, (rows,) = split_rows([reader.rows], [held_out])
    for row in rows:
        yield reader.read_rows(row, row + 1, TargetRequest(next_tokens=True))["plain"].to(device)


def summarise(measured: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and each of them."""
    found = list(measured.values())
    kls = [one["kl"] for one in found]
    return {
        "seeds": len(found),
        **{
            name: statistics.fmean(one[name] for one in found)
            for name in ("kl", "agreement", "perplexity", "teacher_perplexity")
        },
        "kl_sd": statistics.stdev(kls) if len(kls) > 1 else None,
        "kls": kls,
        "kl_by_seed": dict(zip(measured, kls, strict=True)),
        "places": found[0]["places"],
    }


def ratio(one: Mapping[str, Any], ceiling: Mapping[str, Any]) -> float | None:
    """KL over the ceiling's, mean over the seeds that both have; None where they share none."""
    ours, theirs = one["kl_by_seed"], ceiling["kl_by_seed"]
    ratios = [ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys()]
    return statistics.fmean(ratios) if ratios else None


def bytes_per_place(store: Path) -> float:
    """Of the distribution, per position that has one (nearly all of a row's)."""
    info = describe_store(str(store))
    return sum(info.bytes_per_token(path) for path in info.bytes_per_array if path.startswith("logits/"))


def report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.student}, {options.steps} steps of {options.tokens} tokens; held-out rows")
    for name in ("", "seeds", "KL, nats", "sd", "of online", "top-1", "perplexity", "teacher's"):
        table.add_column(name, justify="right" if name else "left")
    ceiling = results.get("online")
    for name, one in results.items():
        of_online = None if ceiling is None else ratio(one, ceiling)
        table.add_row(
            name,
            str(one["seeds"]),
            f"{one['kl']:.4f}",
            "" if one["kl_sd"] is None else f"{one['kl_sd']:.4f}",
            "" if of_online is None else f"{of_online:.3f}",
            f"{one['agreement']:.3f}",
            f"{one['perplexity']:.2f}",
            f"{one['teacher_perplexity']:.2f}",
        )
    Console(file=sys.stderr, width=110).print(table)


if __name__ == "__main__":
    main()
