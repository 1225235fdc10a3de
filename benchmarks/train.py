"""What a training step costs: targets streamed from the store, already on the device, or from a teacher in the loop.

The same steps of the same student are made in six ways, which take turns step by step within one process, so that
their ratios mean something on a machine that others use too (`--ways` chooses some):

- streaming: as `kdtrain` trains. The clock runs until as many blocks are read ahead as before.
- resident: the same engine and loss, with decoded hidden states on the device before the clock starts; queries, keys
  and values are computed from them in each step, as in streaming.
- online: the teacher computes the targets in each step, with the same engine.
- student: the engine and the student's own passes with a trivial loss and no targets: no cache can be faster.
- bare: resident targets in a plain PyTorch loop without the engine; the difference to `resident` is the engine's cost.
  In half precision it is a float32 model under autocast, but for what the engine computes in float32 too, learned maps.
- teacher: the teacher's passes alone, which is what a build costs.

On a GPU a way makes all steps of its turn one after another, and the clock stops when the device has done them: between
single steps it would stand idle, which it does not in a training.

From these times follows how much faster training is than online, how much faster it could be at most, and after how
many epochs over the rows, by one student or by many together, the cache has paid for itself; `--plot` draws it.

    kdcache build --teacher DIR --corpus FILE --seq-len 256 --max-rows 1000 --layers all --precision nmse:1e-2
    python benchmarks/train.py --cache cache.zarr --methods mha,hs --student 3x384

For these two methods the store needs the hidden states before the layer whose attention is learnt, which --layers all
holds, and attention in the default form. `--methods od` takes a store of a
causal teacher: `resident` targets are decoded draws, or most probable ids, and `online` the teacher computes its logits
at the same places, a run of positions at a time, and draws from them as a build does. `student` has no head then.

    python benchmarks/train.py --cache causal.zarr --methods od --student 15x576 --batch-size 4
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import print_record
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModel

from student_train.data.loader import READ_AHEAD, CacheLoader
from student_train.engine.engine import ADAM_BETAS, parameter_groups, running_engine
from student_train.methods.projections import FloatLinear
from student_train.settings import TrainSettings
from student_train.train.feed import Feed, Share
from student_train.train.loop import Progression, Trainer
from student_train.train.metrics import Progress
from student_train.train.prepare import TrainingRun, prepare_run
from teacher_cache.codecs.sparse_logits import draw_samples, topk_log_probabilities
from teacher_cache.contract.batch import Batch, SampledLogits, TargetBatch, TopkLogits
from teacher_cache.format.transforms import read_projections
from teacher_cache.models.arithmetic import move_model
from teacher_cache.models.attention import AttentionProjections, project_hidden
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.models.families import encoder_of, quiet_transformers, with_head
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.read.reader import CacheReader

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Seconds of the processor, over all threads, are what ratios can be told from where other work takes the cores."""
WAYS = ("streaming", "resident", "online", "student", "bare", "teacher")
RATIOS = {
    "streaming_over_resident": ("resident", "streaming"),
    "streaming_over_online": ("online", "streaming"),
    "ceiling_over_online": ("online", "student"),
    "engine_over_bare": ("resident", "bare"),
}
"""Ratios of speeds, as ratios of seconds."""
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Of the teacher in the loop."""


def main() -> None:
    options = parse_options()
    results = {}
    for method in options.methods.split(","):
        results[method] = measure(method, options)
        report(method, results[method])
    if options.plot:
        plot(results, Path(options.plot))
    reader = CacheReader.open(options.cache)
    print_record(
        "train",
        student=options.student,
        teacher=f"{reader.manifest.teacher.layers}x{reader.manifest.teacher.hidden_size}",
        seq_len=reader.manifest.seq_len,
        batch_size=options.batch_size,
        steps=options.steps,
        rounds=options.rounds,
        device=options.device,
        clock=options.clock,
        methods=results,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="cache.zarr")
    parser.add_argument("--methods", default="mha,hs", help="each of mha, hs and od, with its default settings")
    parser.add_argument("--student", default="3x384")
    parser.add_argument("--init", default="auto", help="as of kdtrain; speed does not depend on weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, such as streaming,resident")
    parser.add_argument("--steps", type=int, default=8, help="steps of each way in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--plot", help="picture of the time that many epochs take")
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways: there is no {', '.join(sorted(unknown))}, only {', '.join(WAYS)}")
    if options.plot and set(options.ways) != set(WAYS):
        parser.error("--plot needs all --ways")
    return options


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median tokens a second of each way, and medians over the rounds of their ratios."""
    settings = TrainSettings(
        method=method,
        cache=(options.cache,),
        student=options.student,
        init=options.init,
        steps=10**6,
        batch_size=options.batch_size,
        device=options.device,
        out="never-written",
    )
    run = prepare_run(settings)
    rounds: list[dict[str, float]] = []
    with (
        running_engine(run.model, run.config, device=run.device, warmup=1, steps=run.steps) as engine,
        closing(run.training_batches(0)) as batches,
    ):
        ways = Ways(run, engine, batches, options)
        ways.round(options.ways)  # what is done once is not measured
        for number in range(options.rounds):
            rounds.append(ways.round(options.ways))
            print(f"{method} round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    tokens = options.steps * options.batch_size * run.reader.manifest.seq_len
    medians = {name: statistics.median(each[name] for each in rounds) for name in options.ways}
    found: dict[str, Any] = {"tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()}}
    for name, (slower, faster) in RATIOS.items():
        if {slower, faster} <= set(options.ways):
            found[name] = statistics.median(each[slower] / each[faster] for each in rounds)
    if {"online", "streaming", "teacher"} <= set(options.ways):
        found["epochs_to_pay"] = statistics.median(
            each["teacher"] / (each["online"] - each["streaming"]) for each in rounds
        )
    return {**found, "seconds": rounds}


class Ways:
    """Steps of each way, over the same batches but for streaming, which goes on through the store."""

    def __init__(self, run: TrainingRun, engine: Any, batches: CacheLoader, options: argparse.Namespace) -> None:
        names, steps, clock = options.ways, options.steps, CLOCKS[options.clock]
        self.run, self.engine, self.batches, self.clock = run, engine, batches, clock
        self.turns = count()
        self.trainer = Trainer(run, engine, Progression(), None, Progress(quiet=True))
        self.trainer.progress.start(total=run.steps, step=0)
        self.feed = Feed(run, batches, [], self.trainer.progress.skipped)
        self.bare_loop = BareLoop(run) if "bare" in names else None
        self.loaded_teacher = load_teacher(run)
        layers = run.objective.request.attention_layers
        self.projections = {
            layer: read_projections(run.reader.storage, run.reader.manifest, layer).to(run.device) for layer in layers
        }
        with closing(hidden_batches(run)) as held:
            shares = Feed(run, held, [], self.trainer.progress.skipped)
            found = [share for share in (shares.next() for _ in range(steps)) if share is not None]
            self.shares = [with_views(share, share.batch.views) for share in found]

    def round(self, names: Sequence[str]) -> dict[str, float]:
        """Seconds of each way for all batches, in turns; over the rounds each is as often the first."""
        seconds = dict.fromkeys(names, 0.0)
        turns = [self.shares] if self.run.device == "cuda" else [[share] for share in self.shares]
        for shares in turns:
            first = next(self.turns) % len(names)
            for name in (*names[first:], *names[:first]):
                self.wait_for_device()
                started = self.clock()
                for share in shares:
                    getattr(self, name)(share)
                if name == "streaming":
                    self.wait_for_reading()
                self.wait_for_device()
                seconds[name] += self.clock() - started
        return seconds

    def wait_for_device(self) -> None:
        if self.run.device == "cuda":
            torch.cuda.synchronize()

    def wait_for_reading(self) -> None:
        while self.batches.blocks_ahead < READ_AHEAD:  # else other ways would pay for what is read ahead
            time.sleep(0.001)

    def streaming(self, _share: Share) -> None:
        self.trainer.update(self.feed)

    def resident(self, share: Share) -> None:
        self.trainer.backward(projected(share, self.projections))

    def online(self, share: Share) -> None:
        self.trainer.backward(taught(self.run, self.loaded_teacher, share))

    def student(self, share: Share) -> None:
        pass_of_student(self.run, self.engine, share)

    def bare(self, share: Share) -> None:
        assert self.bare_loop is not None
        self.bare_loop.step(projected(share, self.projections))

    def teacher(self, share: Share) -> None:
        taught(self.run, self.loaded_teacher, share)


@dataclass(frozen=True)
class Decoded:
    """Rows of a batch on the device, whose targets can be replaced."""

    views: Batch

    def part(self, start: int, stop: int) -> Batch:
        return {view: targets.rows(start, stop) for view, targets in self.views.items()}


def with_views(share: Share, views: Batch) -> Share:
    return replace(share, batch=Decoded(views))


def hidden_batches(run: TrainingRun) -> CacheLoader:
    """The same batches with hidden states in place of attention, those that it is computed from among them."""
    wanted = run.objective.request
    layers = (*wanted.hidden_layers, *(layer - 1 for layer in wanted.attention_layers))
    return CacheLoader(
        run.reader,
        replace(wanted, hidden_layers=tuple(sorted(set(layers))), attention_layers=()),
        rows=run.training_rows,
        batch_size=run.settings.batch_size,
        seed=run.settings.seed,
        device=run.device,
    )


def projected(share: Share, projections: Mapping[int, AttentionProjections]) -> Share:
    """The share with queries, keys and values computed from the hidden states it holds."""
    ((view, targets),) = share.batch.views.items()
    attention = {layer: project_hidden(targets.hidden[layer - 1], maps) for layer, maps in projections.items()}
    return with_views(share, {view: replace(targets, attention=attention)})


def load_teacher(run: TrainingRun) -> Any:
    folder, wanted = run.reader.teacher_folder(), run.objective.request
    with quiet_transformers():
        loader = with_head(AutoConfig.from_pretrained(folder)) if wanted.logits else AutoModel
        teacher = loader.from_pretrained(folder).eval()
    move_model(teacher, device=run.device, dtype=next(run.model.parameters()).dtype)
    if wanted.attention_layers:
        enable_tap(teacher)
    return teacher


@torch.no_grad()
def taught(run: TrainingRun, teacher: Any, share: Share) -> Share:
    """The share with its targets from the teacher: hidden states as they are, whatever coordinates a cache uses."""
    request = run.objective.request
    ((view, targets),) = share.batch.views.items()
    with record_attention(teacher, request.attention_layers) as recorded:
        result = encoder_of(teacher)(
            input_ids=targets.input_ids_BT.long(),
            output_hidden_states=bool(request.hidden_layers),
            **forward_arguments(teacher, targets.real_BT(), targets.starts_BT),
        )
    hidden = {layer: result.hidden_states[layer].float() for layer in request.hidden_layers}
    given = replace(targets, hidden=hidden, attention=recorded.vectors)
    if request.logits:
        given = replace(given, logits=distribution(run, LMHead(teacher), targets, result.last_hidden_state))
    return with_views(share, {view: given})


def distribution(
    run: TrainingRun, head: LMHead, targets: TargetBatch, final_BTD: torch.Tensor
) -> TopkLogits | SampledLogits:
    """What a cache would keep, of the teacher's logits at the places of a batch."""
    spec, places = run.reader.manifest.targets.logits, targets.places
    assert spec is not None and places is not None
    real_BM = places.real_BM()
    final_BMD = final_BTD.take_along_dim(places.positions_BM.long().unsqueeze(-1), dim=1)
    random, found = np.random.default_rng(0), []
    for final_PD in final_BMD[real_BM].split(
        max(1, LOGITS_AT_ONCE[run.device] // run.reader.manifest.teacher.vocab_size)
    ):
        logits_PV = head(final_PD)
        if spec.form == "sample":
            points_PN = (np.arange(spec.entries) + random.random((len(final_PD), spec.entries))) / spec.entries
            ids_PN = torch.from_numpy(draw_samples(logits_PV, points_PN, run.reader.manifest.temperature))
            # an id that was drawn twice may be named twice
            found.append((ids_PN, torch.ones_like(ids_PN)))
        else:
            topk = topk_log_probabilities(logits_PV, spec.entries, run.reader.manifest.temperature)
            found.append((topk.ids_PK, topk.log_probs_PK, topk.log_tail_P))
    parts = []
    for values in map(torch.cat, zip(*found, strict=True)):
        parts.append(values.new_zeros((*real_BM.shape, *values.shape[1:]), device=final_BTD.device))
        parts[-1][real_BM] = values.to(final_BTD.device)
    if spec.form == "sample":
        return SampledLogits(ids_BMK=parts[0], counts_BMK=parts[1])
    return TopkLogits(ids_BMK=parts[0], log_probs_BMK=parts[1], log_tail_BM=parts[2])


def pass_of_student(run: TrainingRun, engine: Any, share: Share) -> None:
    """A step of the student alone, its last hidden state pulled towards 0."""
    model, rows = engine.module, run.micro_batch
    for start in range(0, run.share_rows, rows):
        (targets,) = share.batch.part(start, start + rows).values()
        forward, model.forward = (
            model.forward,
            lambda targets: (
                encoder_of(model.student)(
                    input_ids=targets.input_ids_BT.long(),
                    **forward_arguments(model.student, targets.real_BT(), targets.starts_BT),
                ).last_hidden_state
            ),
        )
        try:
            engine.backward(engine(targets).square().mean() * 1e-6, scale_wrt_gas=False)
        finally:
            model.forward = forward
        engine.step()


class BareLoop:
    """A model like the engine's, trained without one."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = prepare_run(run.settings)
        settings = self.run.settings
        self.model = self.run.model
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model), lr=settings.lr, betas=ADAM_BETAS, weight_decay=settings.weight_decay
        )
        self.dtype = torch.bfloat16 if run.config["bf16"]["enabled"] else torch.float32
        for module in self.model.modules():
            if isinstance(module, FloatLinear):
                module.forward = torch.autocast(run.device, enabled=False)(module.forward)

    def step(self, share: Share) -> None:
        run = self.run
        for start in range(0, run.share_rows, run.micro_batch):
            with torch.autocast(run.device, self.dtype, enabled=self.dtype != torch.float32):
                sums = self.model(share.batch.part(start, start + run.micro_batch))
            losses = {n: part.total / share.counts[run.objective.methods[n].counted] for n, part in sums.items()}
            weights = run.objective.weights
            sum(weights[name] * loss for name, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def report(method: str, found: Mapping[str, Any]) -> None:
    table = Table(title=f"{method}: medians of {len(found['seconds'])} rounds")
    for column in ("way", "tok/s", "of streaming"):
        table.add_column(column, justify="right" if column != "way" else "left")
    speeds = found["tokens_per_second"]
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:,.0f}", f"{speed / speeds['streaming']:.3f}" if "streaming" in speeds else "")
    for name in (*RATIOS, "epochs_to_pay"):
        if name in found:
            table.add_row(name.replace("_", " "), "", f"{found[name]:.3f}")
    Console(stderr=True).print(table)


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Time of so many epochs over the rows, in teacher passes over them; students of a sweep add up on one axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, (method, found) in zip(axes[0], results.items(), strict=True):
        speeds = found["tokens_per_second"]
        epochs = [0, 20]
        lines = (
            ("online", 0.0, "teacher in the loop"),
            ("streaming", 1.0, "built once, then cached"),
            ("student", 0.0, "no teacher"),
        )
        for name, start, label in lines:
            cost = speeds["teacher"] / speeds[name]
            axis.plot(epochs, [start + cost * epoch for epoch in epochs], label=label)
        axis.axvline(found["epochs_to_pay"], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=method, xlabel="epochs of all students together", ylabel="time, in teacher passes")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
