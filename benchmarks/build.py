"""How fast a build runs compared with the bare teacher on the same rows.

The bare teacher does the same passes and nothing else: one forward pass for each view of every batch, the head at the
same places as in the build (masked positions, or those of a causal teacher that have a next token), as many of them at
a time, outputs thrown away. The build is `build_cache` from the first forward pass to the
sealed store, with coding, hashing and writing. Loading the teacher and packing the text are not timed on either side.
Rounds take turns in which of the two goes first, so that a machine that warms up or is shared favours neither; the
median of the ratios is reported, and that of processor seconds, which count where other work takes the cores: on idle
ones coding and writing run beside the teacher, and take less time than that.

    python benchmarks/build.py --teacher DIR --corpus FILE
    python benchmarks/build.py --teacher DIR --shape 24x1024 --seq-len 512 --batch-size 64 --corpus FILE
    python benchmarks/build.py --teacher CAUSAL --rows 64 --seq-len 512 --batch-size 4 --corpus FILE

With `--shape` the teacher is an XLM-R of that many layers and width with random weights, and only its tokenizer is read
from DIR: speed does not depend on weights, and bits, which do, are not measured here. On two CPU cores the default size
takes about five minutes a round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import print_record
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForMaskedLM

from teacher_cache.build.build import build_cache
from teacher_cache.build.encode import _LOGITS_AT_ONCE
from teacher_cache.build.inputs import Silent
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import Batch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        settings = BuildSettings(
            teacher=random_teacher(options.teacher, options.shape, scratch) if options.shape else options.teacher,
            corpus=tuple(options.corpus),
            out=str(Path(scratch) / "cache.zarr"),
            seq_len=options.seq_len,
            max_rows=options.rows,
            batch_size=options.batch_size,
            precision=options.precision,
        )
        say("warming up: one build, which also gives the rows for the bare teacher")
        build_cache(settings)
        manifest = CacheReader.open(settings.out).manifest
        rounds = [time_round(settings, number) for number in range(options.rounds)]
    report(options, manifest, rounds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--shape", help="layers x width of a random XLM-R to time instead, such as 24x1024")
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="nmse:1e-2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for the stores (default: the system's temporary folder)")
    return parser.parse_args()


def random_teacher(tokenizer: str, shape: str, scratch: str) -> str:
    """A folder with an XLM-R of this shape, heads 64 wide, and the tokenizer of another folder."""
    layers, width = map(int, shape.split("x"))
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = XLMRobertaConfig(
        vocab_size=len(words),
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.cls_token_id,
        eos_token_id=words.sep_token_id,
    )
    folder = Path(scratch) / "teacher"
    torch.manual_seed(0)
    XLMRobertaForMaskedLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def time_round(settings: BuildSettings, number: int) -> dict[str, float]:
    """Seconds of the bare teacher and of a fresh build."""
    batches = read_batches(settings)
    shutil.rmtree(settings.out)
    seconds = {}
    for name in ("bare", "build") if number % 2 == 0 else ("build", "bare"):
        if name == "bare":
            seconds[name], seconds["bare, processor"] = time_bare_teacher(settings, batches)
        else:
            seconds[name], seconds["build, processor"] = time_build(settings)
    say(f"round {number + 1}: bare {seconds['bare']:.1f} s, build {seconds['build']:.1f} s")
    return seconds


def read_batches(settings: BuildSettings) -> list[Batch]:
    """The inputs of every view, in the batches that the build made."""
    reader = CacheReader.open(settings.out)
    targets = reader.manifest.targets
    # one small target of each view is enough to make the reader give its inputs
    request = TargetRequest(
        hidden_layers=targets.hidden_layers()[:1],
        attention_layers=targets.attention_layers()[:1],
        logits=targets.logits is not None,
    )
    assert settings.batch_size is not None
    starts = [
        (start, min(start + settings.batch_size, last))
        for first, last in map(reader.manifest.block_range, range(reader.manifest.blocks))
        for start in range(first, last, settings.batch_size)
    ]
    return [inputs_only(reader.read_rows(start, stop, request)) for start, stop in starts]


def inputs_only(batch: Batch) -> Batch:
    return {view: replace(targets, hidden={}, attention={}, logits=None) for view, targets in batch.items()}


class StartOfPasses(Silent):
    """Notes the processor's time where a build announces the store that it begins, from when on its seconds count."""

    started: float | None = None

    def note(self, text: str) -> None:
        if self.started is None and " rows x " in text:
            self.started = time.process_time()


def time_build(settings: BuildSettings) -> tuple[float, float]:
    """Seconds of a fresh build, and of the processor."""
    progress = StartOfPasses()
    seconds = build_cache(settings, progress).seconds
    assert progress.started is not None
    return seconds, time.process_time() - progress.started


@torch.inference_mode()
def time_bare_teacher(settings: BuildSettings, batches: list[Batch]) -> tuple[float, float]:
    """Seconds that the teacher takes for its passes over `batches`, and those of the processor."""
    teacher = Teacher.load(settings.teacher)
    started, on_processor = time.monotonic(), time.process_time()
    teacher.start()
    head = teacher.head() if teacher.record.has_mlm_head else None
    at_once = max(1, _LOGITS_AT_ONCE.get(teacher.device.type, 2**28) // teacher.record.vocab_size)
    for batch in batches:
        for targets in batch.values():
            final_BTD = teacher.run(targets.input_ids_BT, targets.length_B, starts_BT=targets.starts_BT).final_BTD
            if targets.places is not None and head is not None:
                positions_BM1 = targets.places.positions_BM.long().unsqueeze(-1).to(final_BTD.device)
                real_BM = targets.places.real_BM().to(final_BTD.device)
                for final_PD in final_BTD.take_along_dim(positions_BM1, dim=1)[real_BM].split(at_once):
                    head(final_PD)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started, time.process_time() - on_processor


def report(options: argparse.Namespace, manifest: Manifest, rounds: list[dict[str, float]]) -> None:
    views = sum(manifest.views_of(view) for view in manifest.targets.views())
    tokens = manifest.rows * manifest.seq_len * views
    table = Table(title=f"{manifest.rows} rows x {manifest.seq_len} tokens, {views} views, {options.precision}")
    for name in ("round", "bare teacher tok/s", "build tok/s", "build / bare", "by processor"):
        table.add_column(name, justify="right")
    ratios = [seconds["bare"] / seconds["build"] for seconds in rounds]
    on_processor = [seconds["bare, processor"] / seconds["build, processor"] for seconds in rounds]
    for number, (seconds, *both) in enumerate(zip(rounds, ratios, on_processor, strict=True), start=1):
        speeds = (f"{tokens / seconds[name]:,.0f}" for name in ("bare", "build"))
        table.add_row(str(number), *speeds, *(f"{ratio:.3f}" for ratio in both))
    table.add_row("median", "", "", *(f"{statistics.median(each):.3f}" for each in (ratios, on_processor)))
    Console().print(table)
    print_record(
        "build",
        teacher=manifest.teacher.name,
        rows=manifest.rows,
        seq_len=manifest.seq_len,
        views=views,
        precision=options.precision,
        logits=manifest.targets.logits and f"{manifest.targets.logits.form} {manifest.targets.logits.entries}",
        seconds=rounds,
        ratio_median=statistics.median(ratios),
        processor_ratio_median=statistics.median(on_processor),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
