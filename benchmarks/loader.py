"""How fast the training loader reads a store, whether its memory stays flat, how long opening takes, how rows mix.

    python benchmarks/loader.py --cache cache.zarr
    python benchmarks/loader.py --cache cache.zarr --minutes 10
    python benchmarks/loader.py --cache cache.zarr --open 1e3,1e7
    python benchmarks/loader.py --cache cache.zarr --mixing --batch-size 32

Without `--cache` a store of `--rows` rows is built first, from `--teacher` and `--corpus`.

Rates are hidden-state components per second, of padded rows, over one epoch from the page cache, medians over rounds.
`--threads` says how many cores torch may use; the loader's own thread runs on the same cores. The columns:

- `limit`: what no loader of these bytes can exceed on one core. numcodecs decompresses the chunks of a block from
  memory without checking anything, then the codes are unpacked to rotated coordinates;
- `read`: what the loader's thread does on one core: read files, check SHA-256, decompress;
- `coordinates`: the loader up to rotated coordinates, where a CPU's work ends if learned maps or an accelerator
  follow;
- `share`: the rate of `coordinates` per core, as a share of the limit;
- `hidden states`: with the rotation back, a matrix product, on the same cores.

`--minutes` runs the loader for so long and samples the memory of the process once a second: slope and max/min after
the first minute (of shorter runs, after a fifth). `--open` times how long it takes to open stores of so many rows,
which have all files but the data, and to make the order of an epoch of as many rows. `--mixing` compares the order of
reading with a true shuffle of the rows: it counts the documents in a batch, the pairs of rows of one document in it,
and the pairs that meet again in the next epoch. A row counts for the document that it begins in.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endurance import watch_memory
from mixing import measure_mixing, report_mixing
from numcodecs import zstd
from opening import report_opening, time_opening
from record import print_record
from rich.console import Console
from rich.table import Table

from student_train.data.loader import CacheLoader
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.format.shards import frames_to_decompress
from teacher_cache.read.reader import CacheReader

CORES = sorted(os.sched_getaffinity(0))


def main() -> None:
    options = parse_options()
    console = Console(stderr=True, width=120)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        reader = CacheReader.open(options.cache or build(options, Path(scratch)))
        figures: dict[str, Any] = {}
        if options.minutes:
            figures["memory"] = watch_memory(reader, hidden_states_of(reader), options.batch_size, options.minutes)
            console.print({name: value for name, value in figures["memory"].items() if name != "samples_mb"})
        if options.open:
            rows = [int(float(text)) for text in options.open.split(",")]
            figures["open"] = time_opening(reader, rows, Path(scratch), options.rounds)
            report_opening(console, figures["open"])
        if options.mixing:
            figures["mixing"] = measure_mixing(reader, options.batch_size)
            report_mixing(console, figures["mixing"])
        if not figures:
            figures["rates"] = measure_rates(reader, hidden_states_of(reader), options)
            report_rates(console, reader, figures["rates"])
    manifest = reader.manifest
    print_record(
        "loader",
        teacher=manifest.teacher.name,
        rows=manifest.rows,
        seq_len=manifest.seq_len,
        block_rows=manifest.block_rows,
        codecs=sorted({spec.codec for spec in manifest.targets.hidden}),
        layers=list(manifest.targets.hidden_layers()),
        batch_size=options.batch_size,
        **figures,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a store with hidden states (default: build one)")
    parser.add_argument("--teacher")
    parser.add_argument("--corpus", nargs="+", default=[])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--precision", default="nmse:1e-2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", default=",".join(str(n) for n in (1, 2, 4, 8, 16) if n <= len(CORES)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="run the loader for so long and watch its memory")
    parser.add_argument("--open", help="numbers of rows to time opening at, such as 1e3,1e7")
    parser.add_argument("--mixing", action="store_true")
    parser.add_argument("--scratch", help="folder for stores (default: the system's temporary folder)")
    options = parser.parse_args()
    if not options.cache and not (options.teacher and options.corpus):
        parser.error("give --cache, or --teacher and --corpus to build a store from")
    return options


def build(options: argparse.Namespace, scratch: Path) -> str:
    out = str(scratch / "cache.zarr")
    print(f"building a store of {options.rows} rows", file=sys.stderr, flush=True)
    settings = BuildSettings(
        teacher=options.teacher,
        corpus=tuple(options.corpus),
        out=out,
        seq_len=options.seq_len,
        max_rows=options.rows,
        targets="hidden",
        precision=options.precision,
    )
    build_cache(settings)
    return out


def hidden_states_of(reader: CacheReader) -> TargetRequest:
    request = TargetRequest(hidden_layers=reader.manifest.targets.hidden_layers())
    if not request.hidden_layers:
        raise SystemExit(
            f"{reader.path} holds no hidden states, which the rates count: build one with --targets hidden"
        )
    return request


def measure_rates(reader: CacheReader, request: TargetRequest, options: argparse.Namespace) -> list[dict[str, float]]:
    """Values per second of the limit and of the loader for every number of cores, medians over rounds."""
    threads = [int(text) for text in options.threads.split(",")]
    if max(threads) > len(CORES):
        raise SystemExit(f"--threads {options.threads!r} asks for more cores than the {len(CORES)} that there are")
    values = reader.rows * reader.manifest.seq_len * reader.manifest.teacher.hidden_size * len(request.hidden_layers)
    rotated = tuple(layer for layer in request.hidden_layers if reader.rotation(layer) is not None)
    coordinates = replace(request, rotated_layers=rotated)
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        # beside each other: on a shared machine, what is compared has met the same neighbours
        for cores in threads:
            keep_to_cores(1)
            for name, took in time_limit(reader, coordinates, options.batch_size).items():
                seconds[cores, name].append(took)
            keep_to_cores(cores)
            seconds[cores, "coordinates"].append(time_epoch(reader, coordinates, options.batch_size))
            seconds[cores, "hidden states"].append(time_epoch(reader, request, options.batch_size))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    measured = []
    for cores in threads:
        rates = {name: values / statistics.median(took) for (on, name), took in seconds.items() if on == cores}
        shares = [
            limit / loader / cores
            for limit, loader in zip(seconds[cores, "limit"], seconds[cores, "coordinates"], strict=True)
        ]
        measured.append({"threads": cores, **rates, "share": statistics.median(shares)})
    return [{name: float(f"{value:.4g}") for name, value in one.items()} for one in measured]


def keep_to_cores(count: int) -> None:
    torch.set_num_threads(count)
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), CORES[:count])


def time_limit(reader: CacheReader, request: TargetRequest, rows: int) -> dict[str, float]:
    """Seconds to decompress all blocks from memory and to unpack their codes; and to read blocks as the loader does.

    Codes are unpacked so many rows at a time, as a loader has to: whole blocks are slower, they leave the CPU's caches.
    """
    read = decompress = unpack = 0.0
    for block in range(reader.manifest.blocks):
        frames = list(frames_of(reader, request, block))
        room = np.empty(max(size for _, size in frames), dtype=np.uint8)
        first, last = reader.manifest.block_range(block)
        started = time.perf_counter()
        coded = reader.load_block(block, request, "plain")
        read, started = read + time.perf_counter() - started, time.perf_counter()
        for frame, size in frames:
            zstd.decompress(frame, room[:size])
        decompressed = time.perf_counter()
        for row in range(0, last - first, rows):
            reader.decode(coded, row, min(row + rows, last - first))
        decompress, unpack = decompress + decompressed - started, unpack + time.perf_counter() - decompressed
    return {"read": read, "decompress": decompress, "unpack": unpack, "limit": decompress + unpack}


def frames_of(reader: CacheReader, request: TargetRequest, block: int) -> Iterator[tuple[memoryview | bytearray, int]]:
    """The zstd frames of a block's hidden states, with the bytes that each holds; without escapes, which are few."""
    for path in reader.layout.arrays_in(*(f"hidden/{layer}" for layer in request.hidden_layers)):
        if "/escapes/" not in path:
            yield from frames_to_decompress(reader.layout.arrays[path], reader.read_shard(path, block))


def time_epoch(source: CacheReader, request: TargetRequest, batch_size: int) -> float:
    """Seconds of an epoch of the loader, its start included."""
    source.decode(source.load_block(0, request, "plain"), 0, 1)  # constants are read once per store
    started = time.perf_counter()
    loader = CacheLoader(
        source, request, rows=(range(source.rows),), batch_size=batch_size, seed=0, stop=source.rows, device="cpu"
    )
    rows = 0
    for batch in loader:
        rows += len(batch.row_ids)
        batch.views  # decodes it  # noqa: B018
    took = time.perf_counter() - started
    loader.close()
    assert rows == source.rows
    return took


def report_rates(console: Console, reader: CacheReader, measured: list[dict[str, float]]) -> None:
    manifest = reader.manifest
    table = Table(
        title=f"{manifest.rows} rows x {manifest.seq_len} tokens, {len(manifest.targets.hidden)} layers of "
        f"{manifest.teacher.hidden_size}\n10^9 values/s, those of the loader per core"
    )
    names = ("threads", "read", "decompress", "unpack", "limit", "coordinates", "share", "hidden states")
    for name in names:
        table.add_column(name, justify="right")
    for one in measured:
        cells = {name: f"{one[name] / 1e9:.3f}" for name in ("read", "decompress", "unpack", "limit")}
        cells |= {name: f"{one[name] / one['threads'] / 1e9:.3f}" for name in ("coordinates", "hidden states")}
        cells |= {"threads": f"{one['threads']:g}", "share": f"{one['share']:.2f}"}
        table.add_row(*(cells[name] for name in names))
    console.print(table)


if __name__ == "__main__":
    main()
