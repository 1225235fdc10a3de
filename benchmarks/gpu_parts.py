"""The parts of `gpu.py`: each measures or checks one thing on a device, and tells its lines as they come.

A part is a function of a `Place`: the device, a folder that all parts share, and whether sizes are toy ones, which show
that the part works and nothing else. `PARTS` names them in their order, with the seconds that each may take; the
trainings read the store that `build` leaves in the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import build
import distribution_loss
import relation_loss
import train
from gpu_checks import (
    Difference,
    MemoryOfBlocks,
    growth,
    host_waits,
    kernel_differences,
    losses_of,
    memory_of_reading,
    run_trainings,
    run_trainings_apart,
    store_differences,
    worst_step,
)
from gpu_inputs import Shape, make_teacher, write_text
from transformers.utils.logging import disable_progress_bar

from student_train.engine.checkpoint import checkpoint_path
from student_train.engine.engine import running_engine
from student_train.run_files import PROVENANCE
from student_train.settings import TrainSettings
from student_train.train.feed import Feed
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import Progress
from student_train.train.prepare import prepare_run
from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import Silent
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.read.reader import CacheReader

TOY = Shape(layers=4, width=32, heads=4, vocabulary=205, positions=64, spread=0.2)
LARGE = Shape(layers=24, width=1024, heads=16, vocabulary=250_002, positions=512)
CAUSAL = Shape(layers=24, width=1024, heads=16, vocabulary=50_000, positions=1024, causal=True)
STEPS = 10
METHODS = {"mha": False, "hs": False, "od": False, "mlm": False, "lm": True, "od, causal": True}
"""Whether each is trained from the decoder's store."""
OF_OTHERS = ("transformers/", "deepspeed/")
"""Packages that wait by themselves: the first asks once a pass and view whether any row is padded or packed."""


@dataclass(frozen=True)
class Line:
    """A figure, in a unit; `most` is what it may be at most, where that decides whether the device computes right."""

    what: str
    value: float | None
    unit: str
    most: float | None = None

    @property
    def holds(self) -> bool:
        return self.most is None or (self.value is not None and self.value <= self.most)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part runs. `python` starts a process that runs Python; where it is empty, none is started."""

    device: str
    small: bool
    folder: Path
    python: Sequence[str] = (sys.executable,)

    @property
    def toy(self) -> dict[bool, Path]:
        """Toy teachers by whether they are causal, made once."""
        return {causal: self.teacher(replace(TOY, causal=causal), f"toy-{causal}") for causal in (False, True)}

    def teacher(self, shape: Shape, name: str) -> Path:
        folder = self.folder / name
        if not (folder / "tokenizer.json").exists():
            make_teacher(folder, shape, "cpu" if self.small else self.device)
        return folder

    def text(self, shape: Shape, tokens: int) -> str:
        path = self.folder / f"text-{shape.vocabulary}-{tokens}.txt"
        return str(path if path.exists() else write_text(path, shape, tokens))

    def toy_build(self, out: Path, causal: bool, device: str, **changes: Any) -> BuildSettings:
        """Settings of a store of a toy teacher, in float32."""
        values: dict[str, Any] = {
            "teacher": str(self.toy[causal]),
            "corpus": (self.text(TOY, 6_000),),
            "out": str(out),
            "seq_len": 32,
            "max_rows": 64,
            "block_rows": 16,
            "layers": "all",
            "targets": "logits,hidden,attention",
            "precision": "float16",
            "dtype": "float32",
            "device": device,
        }
        return BuildSettings(**{**values, **changes})

    def toy_store(self, causal: bool) -> Path:
        """A store of a toy teacher, built on the CPU once."""
        out = self.folder / f"toy-{causal}.zarr"
        if not out.exists():
            build_cache(self.toy_build(out, causal, "cpu"))
        return out

    def train(self, *every: Sequence[Mapping[str, Any]]) -> list[list[list[dict[str, Any]]]]:
        """The records of trainings, those of each sequence in a process of its own if any is started.

        They run beside each other then: nothing is timed.
        """
        if not self.python:
            return [run_trainings(settings) for settings in every]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(partial(run_trainings_apart, python=self.python), every))


Tell = Callable[[Line], None]


def told(difference: Difference) -> Line:
    return Line(difference.what, difference.found, "of it", difference.most)


# ---- is it right ----


def kernels(place: Place, tell: Tell) -> None:
    sizes = {"positions": 40, "widths": ((16, 12),)} if place.small else {}
    for difference in kernel_differences(place.device, **sizes):
        tell(told(difference))


def stores(place: Place, tell: Tell) -> None:
    """A float32 teacher's store, built on the CPU and on the device."""
    for causal, precision, most in ((False, "float16", 1e-3), (False, "nmse:1e-2", 0.2), (True, "float16", 1e-3)):
        # codes of two calibrations differ by their own errors, 0.1 each; some draws fall on an id's other side
        name = f"{'decoder' if causal else 'encoder'}, {precision}"
        out = [place.folder / f"store-{causal}-{precision.replace(':', '-')}-{which}" for which in ("cpu", "device")]
        both = (
            place.toy_build(path, causal, device, precision=precision)
            for path, device in zip(out, ("cpu", place.device), strict=True)
        )
        for difference in store_differences(*both, most=most):
            loose = causal and difference.what == "distribution"
            tell(told(replace(difference, what=f"{name}: {difference.what}", most=0.05 if loose else difference.most)))


def steps(place: Place, tell: Tell) -> None:
    """Ten steps of each method on the CPU and on the device, in float32, and on a GPU in bfloat16."""
    count, methods = (2, {name: METHODS[name] for name in ("mha", "od, causal")}) if place.small else (STEPS, METHODS)
    kinds = [("cpu", "float32"), (place.device, "float32")]
    if place.device == "cuda":
        kinds.append(("cuda", "bfloat16"))
    every = []
    for number, (device, dtype) in enumerate(kinds):
        one = {"steps": count, "batch_size": 16, "micro_batch_size": 8, "valid_share": 0.1, "dtype": dtype}
        every.append(
            [
                {
                    **one,
                    "method": method.partition(",")[0],
                    "cache": [str(place.toy_store(causal))],
                    "out": str(place.folder / f"student-{number}-{method[:2]}-{causal}"),
                    "device": device,
                }
                for method, causal in methods.items()
            ]
        )
    records = place.train(*every)
    losses = [[losses_of(each) for each in of_kind] for of_kind in records]
    for (_, dtype), found, most in zip(kinds[1:], losses[1:], (1e-4, 0.1), strict=False):
        for method, have, want in zip(methods, found, losses[0], strict=True):
            tell(Line(f"{count} steps of {method}, {dtype}: worst loss", worst_step(have, want), "of it", most))


def resume(place: Place, tell: Tell) -> None:
    """A training that goes on from a checkpoint at half its way, against the one that ran through."""
    whole, half = (place.folder / name for name in ("whole", "half"))
    settings = {"method": "mha+hs+od", "cache": [str(place.toy_store(False))], "steps": 6, "save_every": 3, "lr": 5e-3}
    settings |= {"batch_size": 16, "valid_share": 0.1, "device": place.device, "out": str(whole)}
    ((records,),) = place.train([settings])
    shutil.copytree(whole, half)
    shutil.rmtree(checkpoint_path(half, 6))
    for name in ("config.json", "model.safetensors", PROVENANCE):
        (half / name).unlink()
    ((resumed,),) = place.train([{**settings, "out": str(half), "resume": "auto"}])
    # a GPU sums some gradients in the order in which they come
    most = 0.0 if place.device == "cpu" else 1e-2
    tell(Line("worst loss of the resumed training", worst_step(losses_of(resumed), losses_of(records)), "of it", most))


def memory(place: Place, tell: Tell) -> None:
    """Whether memory grows from block to block, in a build and in the training loader."""
    # a stream of its own for every block would keep what the allocator takes at a time, 20 MiB: blocks as large as that
    shape = TOY if place.small else replace(TOY, width=256, positions=128)
    block_rows = 8 if place.small else 32
    rows, seq_len = (16 if place.small else 64) * block_rows, shape.positions // 2
    settings = place.toy_build(
        place.folder / "memory.zarr", False, place.device, teacher=str(place.teacher(shape, "memory-teacher")),
        corpus=(place.text(shape, 2 * rows * seq_len),), seq_len=seq_len, max_rows=rows, block_rows=block_rows,
    )  # fmt: skip
    out, watched = settings.out, MemoryOfBlocks(place.device)
    shutil.rmtree(out, ignore_errors=True)
    build_cache(settings, watched)
    reader = CacheReader.open(out)
    request = TargetRequest(hidden_layers=reader.manifest.targets.hidden_layers(), logits=True)
    read = memory_of_reading(reader, request, place.device, epochs=2)
    for what, samples in (("building", watched.samples), ("reading", read)):
        tell(Line(f"{what}: blocks", len(samples), "blocks"))
        tell(Line(f"{what}: memory at the end", samples[-1] / 2**20, "MiB"))
        tell(Line(f"{what}: growth since the fifth block", growth(samples), "of it", 0.05))


def waits(place: Place, tell: Tell) -> None:
    """How often the host waits for the device in the passes of a step, and in the engine's own part of it."""
    for causal, method in ((False, "mha+hs+od"), (True, "od")):
        found = waits_of(method, place.toy_store(causal), place)
        name = f"{method}, {'decoder' if causal else 'encoder'}"
        ours = [where for where in found["pass"] if not any(package in where for package in OF_OTHERS)]
        # a decoder's losses are computed where tokens are to be learnt: how many these are is asked once
        tell(Line(f"{name}: waits of a pass", len(ours), "waits", 1 if causal else 0))
        tell(Line(f"{name}: waits of a pass in Transformers and DeepSpeed", len(found["pass"]) - len(ours), "waits"))
        tell(Line(f"{name}: waits of the engine's step", len(found["step"]), "waits"))
        for where in sorted({*found["pass"], *found["step"]}):
            tell(Line(f"{name}: of these, {where}", [*found["pass"], *found["step"]].count(where), "waits"))


def waits_of(method: str, store: Path, place: Place) -> dict[str, list[str]]:
    """Where the host waits in the third step, forward and backward, and in what the engine does with the gradients."""
    settings = TrainSettings(
        method=method, cache=(str(store),), steps=10, batch_size=16, device=place.device, out="never-written"
    )
    run = prepare_run(settings)
    with (
        running_engine(run.model, run.config, device=run.device, warmup=1, steps=10) as engine,
        run.training_batches(0) as batches,
    ):
        trainer = Trainer(run, engine, Progression(), None, Progress(quiet=True))
        feed = Feed(run, batches, [], trainer.progress.skipped)
        for _ in range(2):
            share = feed.next()
            assert share is not None
            trainer.backward(share)
        share = feed.next()
        assert share is not None
        views = share.batch.part(0, run.micro_batch)

        def one_pass() -> None:
            sums = trainer.forward(views)
            losses = {
                name: part.total / max(1, share.counts[run.objective.methods[name].counted])
                for name, part in sums.items()
            }
            engine.backward(trainer.weighted(losses), scale_wrt_gas=False)

        return {"pass": host_waits(one_pass, place.device), "step": host_waits(trainer.engine_step, place.device)}


# ---- how fast is it ----


def relation(place: Place, tell: Tell) -> None:
    """One relation, forward and backward, in the types of a training, at as many tokens for every length."""
    lengths = (16, 32) if place.small else (512, 128, 256, 1024, 2048, 4096, 8192)
    kernel = "triton" if place.device == "cuda" else "chunked"
    for positions in lengths:
        compared = ["materialised", "compiled"] if positions <= 2048 else []
        options = relation_options(place, lengths[0], [kernel, f"{kernel}_causal", *compared])
        found = relation_loss.measure(options, positions)["variants"]
        seconds = {name: figures.get("seconds") for name, figures in found.items()}
        for name in (kernel, f"{kernel}_causal"):
            tell(Line(f"T {positions}: {name}", 1e3 * seconds[name], "ms"))
        tell(Line(f"T {positions}: {kernel}, extra memory", found[kernel]["extra_bytes"] / 2**20, "MiB"))
        tell(Line(f"T {positions}: {kernel}, error of the gradient", found[kernel].get("gradient_error"), "of it"))
        for name in compared:
            if seconds.get(name):
                tell(Line(f"T {positions}: {name}", 1e3 * seconds[name], "ms"))
                tell(Line(f"T {positions}: speed of {kernel} over {name}", seconds[name] / seconds[kernel], "x"))
        for name in ("limit_computed", "limit_4"):
            if seconds.get(name):
                tell(Line(f"T {positions}: share of {name.replace('_', ' ')}", seconds[name] / seconds[kernel], "of 1"))


def relation_options(place: Place, positions: int, variants: list[str]) -> argparse.Namespace:
    batch, heads = (2, 2) if place.small else (32, 64)
    return argparse.Namespace(
        device=place.device, dtype="bfloat16" if place.device == "cuda" else "float32", teacher_dtype="float32",
        batch=batch, heads=heads, positions=positions, teacher_width=16, student_width=12, lengths=[], rounds=3,
        tokens=batch * positions, alone=None, here=True, variants=variants,
    )  # fmt: skip


def distribution(place: Place, tell: Tell) -> None:
    """The loss over a large vocabulary, forward and backward."""
    sizes = {"vocabulary": 500, "positions": 40, "width": 16} if place.small else {"width": 768}
    defaults = {"vocabulary": 250_002, "positions": 4_928, "width": 768, "k": 64, "steps": 3, "device": place.device}
    defaults["dtype"] = "bfloat16" if place.device == "cuda" else "float32"
    defaults["logits_at_a_time"] = distribution_loss.LOGITS_AT_A_TIME
    found = {}
    for name in ("projected", "materialised"):
        found[name] = distribution_loss.measure(argparse.Namespace(**{**defaults, **sizes, "one": name}))
        tell(Line(f"{name}", 1e3 * found[name]["seconds"], "ms"))
        tell(Line(f"{name}, extra memory", found[name]["extra_bytes"] / 2**20, "MiB"))
    tell(Line("speed of projected", found["materialised"]["seconds"] / found["projected"]["seconds"], "x"))


def build_speed(place: Place, tell: Tell) -> None:
    """A build against the bare teacher on the same rows; its store is what the trainings read."""
    shape, rows, seq_len = (TOY, 40, 32) if place.small else (LARGE, 2048, 512)
    settings = BuildSettings(
        teacher=str(place.teacher(shape, "teacher")),
        corpus=(place.text(shape, 2 * rows * seq_len),),
        out=str(place.folder / "cache.zarr"),
        seq_len=seq_len,
        max_rows=rows,
        batch_size=8 if place.small else 128,
        block_rows=16 if place.small else 64,
        # what a student of six layers learns from, and the input of the layer whose attention is kept
        layers="uniform:2+last" if place.small else "uniform:6+last",
        device=place.device,
    )
    warm_up = replace(settings, out=str(place.folder / "warm-up.zarr"), max_rows=settings.batch_size or 1)
    shutil.rmtree(warm_up.out, ignore_errors=True)
    build_cache(warm_up)  # what is done once is not measured
    tokens, rounds = rows * seq_len, []
    for number in range(1 if place.small else 2):
        shutil.rmtree(settings.out, ignore_errors=True)
        commits = Commits()
        built = build_cache(settings, commits).seconds
        bare, _ = build.time_bare_teacher(settings, build.read_batches(settings))
        rounds.append(bare / built)
        tell(Line(f"round {number + 1}: bare teacher, both views", tokens / bare, "tok/s"))
        tell(Line(f"round {number + 1}: build", tokens / built, "tok/s"))
        tell(Line(f"round {number + 1}: build, from its first block to its last", seq_len * commits.rate(), "tok/s"))
    tell(Line("speed of the build over the bare teacher", statistics.median(rounds), "x"))


class Commits(Silent):
    """Notes when which rows of a build were safe; what comes before, such as copying the teacher, is done once."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        self.seen.append((time.monotonic(), rows))

    def rate(self) -> float:
        """Rows a second after the first commit."""
        (first, before), (last, after) = next(one for one in self.seen if one[1] > 0), self.seen[-1]
        return (after - before) / max(last - first, 1e-9)


def training(method: str, place: Place, tell: Tell) -> None:
    """A training step: streamed, resident, with the teacher in the loop, and of the student alone."""
    store = place.folder / "cache.zarr"
    if not (store / "zarr.json").exists():
        raise SystemExit("there is no store to train from: the part 'build' makes it, and has to run first")
    tell_ways(place, tell, method, store, "2x32" if place.small else "6x768", (2, 1, 4) if place.small else (6, 3, 128))


def causal_training(place: Place, tell: Tell) -> None:
    """The same of a decoder, `od` from draws."""
    shape = replace(TOY, causal=True) if place.small else CAUSAL
    rows, seq_len = (32, 32) if place.small else (256, 1024)
    settings = BuildSettings(
        teacher=str(place.teacher(shape, "causal-teacher")),
        corpus=(place.text(shape, 2 * rows * seq_len),),
        out=str(place.folder / "causal.zarr"),
        seq_len=seq_len,
        max_rows=rows,
        block_rows=16,
        device=place.device,
    )
    shutil.rmtree(settings.out, ignore_errors=True)
    report = build_cache(settings)
    tell(Line("build", rows * seq_len / report.seconds, "tok/s"))
    sizes = (2, 1, 4) if place.small else (3, 2, 32)
    tell_ways(place, tell, "od", Path(settings.out), "2x32" if place.small else "12x1024", sizes)


def tell_ways(place: Place, tell: Tell, method: str, store: Path, student: str, sizes: tuple[int, int, int]) -> None:
    """Of steps of one turn, rounds, and rows of a step."""
    steps, rounds, batch_size = sizes
    ways = ["streaming", "resident", "online", "student"]
    options = argparse.Namespace(
        cache=str(store), student=student, init="random", batch_size=batch_size, ways=ways, device=place.device,
        steps=steps, rounds=rounds, clock="wall",
    )  # fmt: skip
    found = train.measure(method, options)
    for way, speed in found["tokens_per_second"].items():
        tell(Line(f"{way}", speed, "tok/s"))
    for name, text in (
        ("streaming_over_resident", "speed of streaming over resident"),
        ("streaming_over_online", "speed of streaming over online"),
        ("ceiling_over_online", "speed of the student alone over online"),
    ):
        tell(Line(text, found[name], "x"))


PARTS: dict[str, tuple[Callable[[Place, Tell], None], int]] = {
    "kernels": (kernels, 60),
    "stores": (stores, 45),
    "steps": (steps, 100),
    "resume": (resume, 60),
    "waits": (waits, 40),
    "memory": (memory, 45),
    "relation": (relation, 120),
    "distribution": (distribution, 40),
    "build": (build_speed, 170),
    "train mha": (partial(training, "mha"), 60),
    "train hs": (partial(training, "hs"), 60),
    "train od": (partial(training, "od"), 60),
    "train causal od": (causal_training, 110),
}
"""With the seconds that each may take."""


def print_lines(name: str, place: Place) -> None:
    """Run a part here, a JSON line on standard output for each of its lines."""
    disable_progress_bar()
    PARTS[name][0](place, lambda line: print(json.dumps(asdict(line)), flush=True))
