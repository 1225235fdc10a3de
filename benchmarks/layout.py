"""Size, number of files, write and read rates of this store against the usual ways to keep hidden states on disk.

The teacher reads the rows once; what it gave is then kept in every format of `formats.py`, one after another, for a few
rounds, of which the median counts. Everything runs on one core. Formats get the same float32 values block by block, and
give back batches of as many rows as a block has, with their token ids. Before reading is timed, all of it is read in
both orders and compared with what was written: float16 must be exact, the others within the error that they declare.

    python benchmarks/layout.py --teacher DIR --corpus FILE

Rates are values per second. `write` ends when everything is on the disk: this store flushes each shard as it goes; of
the others every file and folder is flushed at the end, and that counts. What is done once per corpus, however large
(calibration of `nmse`), does not. `load` ends with a batch in memory, checked and decompressed, as it would be sent to
an accelerator: codes of this store, float16 of the others; `decode` ends with contiguous float32 on the same core.
`in order` reads the rows as they lie; `shuffled` is an epoch in random order: block by block for what is stored by
block, row by row for the others.

Reads come from the page cache, so that they measure the formats and not the disk. With --cold it is emptied of what is
about to be read, which needs no privileges, but a file system on a disk. Bytes are everything in the folder, with this
store's constants (about 600 kB a layer of 384 components in `nmse`, whatever the corpus).

The default takes 0.7 GB of scratch space: 0.4 GB for what the teacher gave, and one format at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from formats import IDS, Format, Hdf5, Load, Parquet, Samples, Shapes, StoreFormat, pt_per_row, safetensors_per_row
from record import keep_to_one_core, print_record
from recorded import RecordedTeacher
from rich.console import Console
from rich.table import Table
from truth import Truth

from teacher_cache.build.resolve import make_manifest, plan_targets
from teacher_cache.build.settings import BuildSettings
from teacher_cache.corpus.corpus import pack_corpus
from teacher_cache.teacher.teacher import Teacher

BASELINE = "safetensors a row"
PRECISIONS = ("nmse:1e-2", "int8", "float16")
SECONDS = {
    "write": ("write",),
    "load in order": ("load in order",),
    "load shuffled": ("load shuffled",),
    "load + decode": ("load shuffled", "decode shuffled"),
}
"""Columns of the table, and the measured seconds that each adds up."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        settings = BuildSettings(
            teacher=options.teacher,
            corpus=tuple(options.corpus),
            seq_len=options.seq_len,
            max_rows=options.rows,
            targets="hidden",
            layers=options.layers,
            block_rows=options.block_rows,
        )
        formats, truth = prepare(settings, Path(scratch))
        keep_to_one_core()
        rounds: dict[str, list[dict[str, float]]] = {one.name: [] for one in formats}
        for number in range(options.rounds):
            for one in formats:
                folder = Path(scratch) / "format"
                folder.mkdir()
                rounds[one.name].append(measure(one, folder, truth, settings.block_rows, cold=options.cold))
                shutil.rmtree(folder)
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    medians = {name: median(measured) for name, measured in rounds.items()}
    report(truth, medians, cold=options.cold)
    print_record(
        "layout",
        teacher=options.teacher,
        layers=sorted(truth.hidden),
        rows=len(truth.ids_BT),
        seq_len=options.seq_len,
        block_rows=options.block_rows,
        values=truth.values,
        cold=options.cold,
        rounds=rounds,
        median=medians,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--block-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="empty the page cache of what is about to be read")
    parser.add_argument("--scratch", help="folder for the files (default: the system's temporary folder)")
    return parser.parse_args()


def prepare(settings: BuildSettings, scratch: Path) -> tuple[list[Format], Truth]:
    """Let the teacher read the rows, and make every format."""
    teacher = Teacher.load(settings.teacher)
    assert settings.seq_len is not None
    rows = pack_corpus(
        settings.corpus,
        teacher.tokenizer,
        seq_len=settings.seq_len,
        row_mode=settings.rows,
        seed=settings.seed,
        max_rows=settings.max_rows,
    )
    manifests = {}
    for precision in PRECISIONS:
        own = replace(settings, precision=precision)
        targets, _ = plan_targets(own, teacher, print)
        manifests[precision] = make_manifest(own, teacher, targets, rows, settings.seq_len)
    layers = manifests[PRECISIONS[0]].targets.hidden_layers()
    teacher.start()
    recorded = RecordedTeacher(teacher, rows, layers, settings.seq_len, scratch)
    shape = (settings.seq_len, teacher.record.hidden_size)
    shapes = Shapes(
        of_row={IDS: shape[:1], **{f"hidden.{layer}": shape for layer in layers}}, block_rows=settings.block_rows
    )
    formats: list[Format] = [
        *(StoreFormat(manifest, precision, recorded, rows) for precision, manifest in manifests.items()),
        safetensors_per_row(BASELINE, shapes),
        pt_per_row(".pt a row", shapes),
        Hdf5("HDF5", shapes, len(rows)),
        Hdf5("HDF5, gzip", shapes, len(rows), compression="gzip", shuffle=True),
        Parquet("Parquet by row", shapes, 1),
        Parquet(f"Parquet by {settings.block_rows} rows", shapes, settings.block_rows),
    ]
    return formats, Truth(recorded, rows)


def measure(one: Format, folder: Path, truth: Truth, block_rows: int, *, cold: bool) -> dict[str, float]:
    """Write and read one format: seconds, bytes, files, error."""
    count = len(truth.ids_BT)
    blocks = [range(first, min(first + block_rows, count)) for first in range(0, count, block_rows)]
    started = time.perf_counter()
    with one.writer(folder) as write:
        prepared = time.perf_counter()
        for block in blocks:
            write(block.start, truth.samples(block.start, block.stop))
    written = time.perf_counter()
    flush(folder)
    flushed = time.perf_counter()
    files = [path for path in folder.rglob("*") if path.is_file()]
    measured = {
        "bytes": sum(file.stat().st_size for file in files),
        "allocated bytes": sum(file.stat().st_blocks * 512 for file in files),
        "files": len(files),
        "prepare": prepared - started,
        "write": flushed - prepared,
        "flush": flushed - written,
    }
    orders: dict[str, Sequence[Sequence[int]]] = {"in order": blocks, "shuffled": shuffle(one, blocks)}
    with one.reader(folder) as load:
        measured["NMSE"] = max(truth.check(one, read(load, batches)) for batches in orders.values())
    for name, batches in orders.items():
        measured |= {f"{step} {name}": took for step, took in time_reading(one, folder, batches, cold=cold).items()}
    return measured


def flush(folder: Path) -> None:
    """Have everything in a folder on the disk, names included."""
    for path in [folder, *folder.rglob("*")]:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def shuffle(one: Format, blocks: list[range]) -> list[Sequence[int]]:
    """The batches of an epoch in random order, the same for all formats that are read alike."""
    generator = np.random.default_rng(0)
    if one.by_block:
        return [blocks[place] for place in generator.permutation(len(blocks))]
    rows = generator.permutation(blocks[-1].stop)
    return [rows[block.start : block.stop].tolist() for block in blocks]


def read(load: Load, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Samples]]:
    return ((rows, load(rows)()) for rows in batches)


def time_reading(one: Format, folder: Path, batches: Sequence[Sequence[int]], *, cold: bool) -> dict[str, float]:
    """Seconds to load all batches, and to decode them."""
    seconds = {"load": 0.0, "decode": 0.0}
    with one.reader(folder) as load:
        load(batches[0])()  # what is read once per store, such as metadata and rotations, is not part of the rate
        before = drop_from_cache(folder) if cold else 0
        for rows in batches:
            started = time.perf_counter()
            decode = load(rows)
            loaded = time.perf_counter()
            decode()
            seconds["load"] += loaded - started
            seconds["decode"] += time.perf_counter() - loaded
    if cold and bytes_from_storage() - before < 0.5 * sum(file.stat().st_size for file in folder.rglob("*")):
        raise SystemExit(
            f"--cold: the files of {one.name!r} stayed in memory; choose a folder on a disk with --scratch"
        )
    return seconds


def drop_from_cache(folder: Path) -> int:
    """Have the kernel forget the contents of flushed files; returns the bytes that came from storage so far."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)
    return bytes_from_storage()


def bytes_from_storage() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def median(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in measured) for name in measured[0]}


def report(truth: Truth, medians: dict[str, dict[str, float]], *, cold: bool) -> None:
    count, seq_len = truth.ids_BT.shape
    baseline, state = medians[BASELINE], "cold" if cold else "warm"
    table = Table(
        title=f"{count} rows x {seq_len} tokens, {len(truth.hidden)} layers, one core, {state} page cache\nrates in "
        "10^6 values/s, in brackets the ratio to one safetensors file a row"
    )
    table.add_column("")
    for name in ("bytes/token", "files", *SECONDS, "NMSE"):
        table.add_column(name, justify="right")
    for name, one in medians.items():
        cells = [f"{one['bytes'] / count / seq_len:,.0f} ({one['bytes'] / baseline['bytes']:.2f})", f"{one['files']:g}"]
        for parts in SECONDS.values():
            took, usual = (sum(measured[part] for part in parts) for measured in (one, baseline))
            cells.append(f"{truth.values / took / 1e6:,.0f} ({usual / took:.2f})")
        table.add_row(name, *cells, f"{one['NMSE']:.2g}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
