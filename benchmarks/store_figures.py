"""How many bytes each target takes in a store, and how fast the store is built and read."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from student_train.data.loader import CacheLoader
from teacher_cache.build.build import BuildReport, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.models.families import quiet_transformers
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader

READ_PASSES = 3


def build(settings: BuildSettings) -> BuildReport:
    print(f"building {settings.out}", file=sys.stderr, flush=True)
    with quiet_transformers():
        return build_cache(settings)


def measure_store(settings: BuildSettings) -> dict[str, Any]:
    """Build a store, and say what it takes and how fast it is written and read."""
    report = build(settings)
    info = describe_store(settings.out)
    assert settings.seq_len is not None
    tokens = report.rows * settings.seq_len
    return {
        "bytes_per_token": bytes_by_target({path: info.bytes_per_token(path) for path in info.bytes_per_array}),
        "total_bytes_per_token": sum(map(info.bytes_per_token, info.bytes_per_array)),
        "other_bytes": info.other_bytes,
        "build_tokens_per_second": tokens / report.seconds,
        "read_tokens_per_second": tokens / read_seconds(CacheReader.open(settings.out)),
    }


def read_seconds(reader: CacheReader) -> float:
    """Of the median pass of the loader over all that the store holds."""
    targets = reader.manifest.targets
    request = TargetRequest(
        hidden_layers=targets.hidden_layers(),
        attention_layers=targets.attention_layers(),
        logits=targets.logits is not None,
    )
    reader.read_rows(0, 1, request)  # constants are read once per store
    return statistics.median(pass_seconds(reader, request) for _ in range(READ_PASSES))


def pass_seconds(reader: CacheReader, request: TargetRequest) -> float:
    started = time.perf_counter()
    loader = CacheLoader(reader, request, rows=(range(reader.rows),), batch_size=16, seed=0, stop=reader.rows)
    with closing(loader):
        rows = sum(len(targets.length_B) for batch in loader for targets in batch.views.values())
    assert rows == reader.rows
    return time.perf_counter() - started


def check_rows(store: Path, reference: Path) -> None:
    """The last rows of the reference are held out of a training on this store only if both hold the same rows."""
    one, other = (CacheReader.open(path).manifest for path in (store, reference))
    for name in ("rows", "first_row", "seed", "seq_len"):
        assert getattr(one, name) == getattr(other, name), f"{store} and {reference} differ in {name}"
    assert one.corpus.fingerprint == other.corpus.fingerprint, f"{store} and {reference} hold other texts"


def bytes_by_target(array_bytes: Mapping[str, float]) -> dict[str, float]:
    """Bytes of arrays summed into inputs (token ids, masks), logits, hidden and attention, as far as they are there."""
    sums: dict[str, float] = {}
    for path, size in array_bytes.items():
        head = path.partition("/")[0]
        target = head if head in ("logits", "hidden", "attention") else "inputs"
        sums[target] = sums.get(target, 0.0) + size
    return sums
