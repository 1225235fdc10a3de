"""What it costs to leave most of a teacher's weights on the disk: speed and memory beside the same teacher in memory.

Two processes read the same rows as a build does, with the head at every position: one holds the teacher, the other has
room for a share of its weights (`--share`, a quarter) and brings the rest from the checkpoint for every batch. They
take turns, so that a shared machine favours neither. The median of the ratios of their times is reported, that of
processor seconds, and by how much the memory of each has grown that is no page of a file. Final states and the sums of
the logits must be the same bit for bit.

    python benchmarks/offload.py --teacher DIR --corpus FILE

With files that the system holds in memory already (`--drop-pages` asks it to forget them before every batch) bringing
weights is a copy; on a slow disk a batch must be larger. On two CPU cores a round of SmolLM2-135M takes two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from record import print_record
from rich.console import Console
from rich.table import Table

from teacher_cache.build.inputs import Silent, choose_batch_rows, pack_rows
from teacher_cache.build.settings import BuildSettings
from teacher_cache.corpus.corpus import RowBlock
from teacher_cache.models.placing import Placement
from teacher_cache.teacher.teacher import Teacher

_PLACES = 256
"""Positions whose logits exist at a time."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A pass over the rows: seconds, processor seconds, growth of memory in bytes, a hash of what came out."""

    seconds: float
    processor: float
    memory: int
    outputs: str


def main() -> None:
    options = parse_options()
    settings = BuildSettings(
        teacher=options.teacher,
        corpus=(options.corpus,),
        seq_len=options.seq_len,
        max_rows=options.rows,
        batch_size=options.batch_size,
        device="cpu",
        device_map="auto",
    )
    weights = sum(each.numel() * 4 for each in Teacher.load(options.teacher, device="cpu").model.parameters())
    budget = int(weights * options.share)
    held: dict[str, list[Round]] = {"in memory": [], "on the disk": []}
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, placement in (("in memory", None), ("on the disk", Placement(most_bytes={"cpu": budget}, cpu_only=True))):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, settings, placement, options.drop_pages), daemon=True)
        process.start()
        workers[name] = ours, process
    for number in range(options.rounds + 1):
        for name in held if number % 2 else reversed(held):
            workers[name][0].send("go")
            found: Round = workers[name][0].recv()
            if number:  # the first one warms up
                held[name].append(found)
    for connection, process in workers.values():
        connection.send("end")
        process.join()
    outputs = {each.outputs for rounds in held.values() for each in rounds}
    if len(outputs) != 1:
        raise SystemExit(f"the two do not compute the same: {outputs}")
    report(options, weights, budget, held)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--share", type=float, default=0.25, help="of its weights (as float32) that may lie in memory")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="default: as `kdcache build --device-map auto` chooses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drop-pages", action="store_true", help="forget the checkpoint's pages before every batch")
    return parser.parse_args()


def work(connection: Connection, settings: BuildSettings, placement: Placement | None, drop_pages: bool) -> None:
    """Read the rows each time when told to."""
    teacher = Teacher.load(settings.teacher, device="cpu", placement=placement)
    seq_len = settings.seq_len
    assert seq_len is not None
    rows = pack_rows(settings, teacher, seq_len, Silent())
    block = rows.read(0, len(rows))
    at_once = choose_batch_rows(settings, teacher, seq_len)
    teacher.start()
    before = anonymous_memory()
    while connection.recv() == "go":
        connection.send(read(teacher, block, at_once, before, drop_pages))


@torch.inference_mode()
def read(teacher: Teacher, block: RowBlock, at_once: int, before: int, drop_pages: bool) -> Round:
    digest, most = hashlib.sha256(), 0
    started, processor = time.monotonic(), time.process_time()
    for first in range(0, len(block.row_id_B), at_once):
        if drop_pages:
            forget(Path(teacher.record.name))
        part = slice(first, first + at_once)
        starts_BT = None if block.starts_BT is None else torch.from_numpy(block.starts_BT[part])
        outputs = teacher.run(
            torch.from_numpy(block.input_ids_BT[part]).long(),
            torch.from_numpy(block.length_B[part]),
            starts_BT=starts_BT,
        )
        most = max(most, anonymous_memory())
        head = teacher.head()
        for final_PD in outputs.final_BTD.flatten(0, 1).split(_PLACES):
            digest.update(final_PD.numpy().tobytes() + head(final_PD).sum(dim=1).numpy().tobytes())
        most = max(most, anonymous_memory())
    return Round(
        seconds=time.monotonic() - started,
        processor=time.process_time() - processor,
        memory=most - before,
        outputs=digest.hexdigest(),
    )


def anonymous_memory() -> int:
    """Memory of this process that is no page of a file, in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget(folder: Path) -> None:
    """Ask the system to give up what it holds of a checkpoint's files."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def report(options: argparse.Namespace, weights: int, budget: int, held: dict[str, list[Round]]) -> None:
    table = Table(title=f"{options.rows} rows of {options.seq_len} tokens; weights {weights / 1e6:.0f} MB")
    for name in ("weights", "seconds", "processor seconds", "memory grown, MB"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    medians = {}
    for name, rounds in held.items():
        medians[name] = {
            "seconds": statistics.median(each.seconds for each in rounds),
            "processor_seconds": statistics.median(each.processor for each in rounds),
            "memory_bytes": max(each.memory for each in rounds),
        }
        table.add_row(
            name,
            *(f"{medians[name][key]:.1f}" for key in ("seconds", "processor_seconds")),
            f"{medians[name]['memory_bytes'] / 1e6:.0f}",
        )
    pairs = list(zip(held["in memory"], held["on the disk"], strict=True))
    speed = statistics.median(resident.seconds / placed.seconds for resident, placed in pairs)
    processor = statistics.median(resident.processor / placed.processor for resident, placed in pairs)
    console = Console(file=sys.stderr)
    console.print(table)
    console.print(f"speed on the disk: {speed:.2f} of that in memory ({processor:.2f} by processor seconds)")
    print_record(
        "offload",
        **vars(options),
        weights_bytes=weights,
        budget_bytes=budget,
        speed=speed,
        speed_by_processor=processor,
        **{name.replace(" ", "_"): values for name, values in medians.items()},
    )


if __name__ == "__main__":
    main()
