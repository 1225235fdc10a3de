"""Make stores of any number of rows with all files but the data, to time how long opening them takes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from student_train.data.order import RowOrder
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    COMMITS,
    SEAL,
    TEACHER_FILES,
    Commit,
    ObjectDigest,
    Seal,
    commit_key,
    digest_object,
    list_commit_hashes,
    read_teacher_files,
    shard_key,
    write_manifest,
)
from teacher_cache.format.writer import GroupWriter
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage


def time_opening(source: CacheReader, sizes: Iterable[int], scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds to open a store of each number of rows, and to order an epoch of it; medians, from the page cache."""
    measured = []
    for rows in sizes:
        folder = scratch / f"{rows}.zarr"
        print(f"writing all but the data of a store of {rows:,} rows", file=sys.stderr, flush=True)
        write_without_data(source, folder, rows)
        reader = open_caches([str(folder)])
        order = RowOrder(rows=(range(rows),), bounds=reader.block_bounds, seed=0)
        measured.append(
            {
                "rows": rows,
                "blocks": len(reader.block_bounds) - 1,
                "open_seconds": median_seconds(lambda _, at=str(folder): open_caches([at]), rounds),
                "epoch_order_seconds": median_seconds(
                    lambda epoch, order=order, rows=rows: next(order.segments(epoch * rows, epoch * rows + 1)), rounds
                ),
            }
        )
    return measured


def write_without_data(source: CacheReader, folder: Path, rows: int) -> None:
    """A sealed store like `source`, of its first hidden states only: manifest, metadata, constants, commits and seal.

    Commits are written past the storage, which would wait for the disk after each of them.
    """
    hidden = source.manifest.targets.hidden[:1]
    manifest = replace(
        source.manifest,
        rows=rows,
        targets=TargetSpecs(hidden=hidden),
        calibration={
            path: record for path, record in source.manifest.calibration.items() if path == f"hidden/{hidden[0].layer}"
        },
    )
    storage, group = LocalStorage(folder), Group(prefix="", manifest=manifest, seal=None)
    write_manifest(storage, "", manifest)
    GroupWriter(storage, group).write_metadata()
    for path in group.layout.constants:
        for key in source.storage.list(f"{path}/"):
            storage.write(key, source.storage.read(key))
    storage.write(TEACHER_FILES, source.storage.read(TEACHER_FILES))
    objects = {key: digest_object(storage, key) for key in storage.list()} | read_teacher_files(storage)
    (folder / COMMITS).mkdir()
    hashes = []
    for block in range(manifest.blocks):
        shards = {
            key: ObjectDigest(size=1, sha256=sha256(key.encode()).hexdigest())
            for key in (shard_key(spec, block) for spec in group.arrays.values())
        }
        data = Commit(block=block, rows=manifest.block_range(block), shards=shards).to_bytes()
        (folder / commit_key(block)).write_bytes(data)
        hashes.append(ObjectDigest.of(data).sha256)
    listed = list_commit_hashes(hashes)
    storage.write(COMMIT_HASHES, listed)
    seal = Seal(
        rows=rows,
        blocks=manifest.blocks,
        bytes_per_array=dict.fromkeys(group.arrays, manifest.blocks),
        objects=objects | {COMMIT_HASHES: ObjectDigest.of(listed)},
        format_version=manifest.format_version,
    )
    storage.write(SEAL, seal.to_bytes())


def median_seconds(step: Callable[[int], object], rounds: int) -> float:
    took = []
    for number in range(rounds):
        started = time.perf_counter()
        step(number)
        took.append(time.perf_counter() - started)
    return float(f"{statistics.median(took):.4g}")


def report_opening(console: Console, measured: list[dict[str, Any]]) -> None:
    table = Table(title="a sealed store in the page cache; one hidden state")
    for name in ("rows", "blocks", "open, ms", "order of an epoch, ms"):
        table.add_column(name, justify="right")
    for one in measured:
        table.add_row(
            f"{one['rows']:,}",
            f"{one['blocks']:,}",
            f"{one['open_seconds'] * 1e3:.1f}",
            f"{one['epoch_order_seconds'] * 1e3:.2f}",
        )
    console.print(table)
