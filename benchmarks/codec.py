"""Bits, error and speed of every precision on hidden states of a teacher.

The teacher reads the rows once; what it gave is then coded, written, read and decoded by the code that builds and reads
real stores, on one thread. Bits are those on disk (codes, scales, escapes; the constants of a stream apart, they do
not grow with the corpus). Entropy is the order-0 entropy of each component's codes, which no packing or Huffman code
beats without context; the bound is the rate of a Gaussian source of the same covariance at the error measured. NMSE is
measured on rows that calibration has not seen, against the teacher's own float32.

    python benchmarks/codec.py --teacher DIR --corpus FILE

Rates are values per second and core: `encode` rotates, rounds and packs, `write` compresses, hashes and flushes, `load`
reads, checks and decompresses, `unpack` gives rotated coordinates in float32, `decode` the hidden states themselves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import print_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from teacher_cache.batch import TargetRequest
from teacher_cache.block import compute_block
from teacher_cache.calibration import ensure_calibrated, load_quantisers, share_rows
from teacher_cache.contract import Manifest
from teacher_cache.corpus import Rows, pack_corpus
from teacher_cache.info import describe_store
from teacher_cache.reader import CacheReader
from teacher_cache.settings import BuildSettings
from teacher_cache.specify import make_manifest, plan_targets
from teacher_cache.specs import HiddenSpec, TargetSpecs, parse_precision
from teacher_cache.storage import LocalStorage
from teacher_cache.store import groups_to_build
from teacher_cache.teacher import Teacher, TeacherOutputs

COLUMNS = ("layer", "precision", "bits", "entropy", "bound", "NMSE", "encode", "write", "load", "unpack", "decode")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    settings = BuildSettings(
        teacher=options.teacher,
        corpus=tuple(options.corpus),
        seq_len=options.seq_len,
        max_rows=options.rows,
        targets="hidden",
        layers=options.layers,
    )
    teacher = Teacher.load(settings.teacher)
    targets, _ = plan_targets(settings, teacher, print)
    rows = pack_corpus(
        settings.corpus, teacher.tokenizer, seq_len=options.seq_len, row_mode="packed", seed=0, max_rows=options.rows
    )
    manifest = make_manifest(settings, teacher, targets, rows, options.seq_len)
    teacher.start()
    recorded = RecordedTeacher(teacher, rows, targets.hidden_layers())
    measured = []
    for layer in targets.hidden_layers():
        for precision in options.precisions:
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                measured.append(measure(Path(scratch) / "cache.zarr", manifest, layer, precision, recorded, rows))
    report(measured)
    print_record("codec", teacher=options.teacher, rows=len(rows), seq_len=options.seq_len, measured=measured)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--precisions", nargs="+", default=["float16", "int8", "nmse:1e-3", "nmse:1e-2", "nmse:1e-1"])
    parser.add_argument("--scratch", help="folder for the stores (default: the system's temporary folder)")
    return parser.parse_args()


class RecordedTeacher:
    """What a teacher gave for some rows, given again: every precision codes the same numbers."""

    def __init__(self, teacher: Teacher, rows: Rows, layers: Iterable[int]) -> None:
        self.device, self.record, self.tokenizer = torch.device("cpu"), teacher.record, teacher.tokenizer
        parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._place: dict[bytes, int] = {}
        for first in track(range(0, len(rows), 16), "the teacher reads the rows"):
            part = rows.read(first, min(first + 16, len(rows)))
            ids_BT = torch.from_numpy(part.input_ids_BT).long()
            outputs = teacher.run(ids_BT, torch.from_numpy(part.length_B), hidden_layers=parts)
            for layer, values in outputs.hidden.items():
                parts[layer].append(values.float().cpu())
            self._place |= {ids.numpy().tobytes(): first + row for row, ids in enumerate(ids_BT)}
        self.hidden = {layer: torch.cat(values) for layer, values in parts.items()}

    def run(self, input_ids_BT: torch.Tensor, length_B: torch.Tensor, **layers: Iterable[int]) -> TeacherOutputs:
        places = [self._place[ids.numpy().tobytes()] for ids in input_ids_BT]
        hidden = {layer: self.hidden[layer][places] for layer in layers["hidden_layers"]}
        return TeacherOutputs(hidden=hidden, attention={}, final_BTD=torch.empty(0))


def measure(
    out: Path, manifest: Manifest, layer: int, precision: str, recorded: RecordedTeacher, rows: Rows
) -> dict[str, Any]:
    spec = HiddenSpec(layer=layer, codec=parse_precision(precision))
    [writer] = groups_to_build(LocalStorage(out), replace(manifest, targets=TargetSpecs(hidden=(spec,))))
    seconds = dict.fromkeys(("calibrate", "replay", "encode", "write", "load", "unpack", "decode"), 0.0)
    clock = Clock(seconds)
    teacher: Any = recorded
    writer = ensure_calibrated(writer, teacher, rows, 16, {}, lambda _text: None)
    quantisers = load_quantisers(writer.storage, writer.manifest, {})
    writer.write_metadata()
    clock.lap("calibrate")
    for block in range(writer.manifest.blocks):
        part = rows.read(*writer.manifest.block_range(block))
        clock.start()
        recorded.run(torch.from_numpy(part.input_ids_BT).long(), torch.empty(0), hidden_layers=(layer,))
        clock.lap("replay")
        arrays = compute_block(writer.manifest, teacher, quantisers, part, len(part.input_ids_BT)).finish()
        clock.lap("encode")
        writer.write_block(block, arrays)
        clock.lap("write")
    seconds["encode"] -= seconds.pop("replay")  # fetching what was recorded is no part of coding it
    decoded = read_all(CacheReader.open(out, allow_unsealed=True), layer, clock)
    truth = recorded.hidden[layer].flatten(0, 1)
    known = 0
    if writer.manifest.calibration:
        known = sum(share_rows(len(rows), manifest.seq_len, manifest.teacher.hidden_size)) * manifest.seq_len
    if known >= len(truth):
        raise SystemExit(
            f"calibration takes {known // manifest.seq_len} rows, which leaves none to measure: raise --rows"
        )
    nmse = measure_error(decoded[known:], truth[known:])
    values = truth.numel()
    constants = [file for name in ("basis", "mean") for file in (out / f"hidden/{layer}/{name}").rglob("*")]
    return {
        "layer": layer,
        "precision": precision,
        "bits": describe_store(out).bits_per_value()[f"hidden/{layer}"],
        "entropy": entropy(out, writer.manifest, layer, quantisers, truth),
        "bound": gaussian_bound(truth, nmse),
        "NMSE": nmse,
        **{f"{name}_values_per_second": values / took for name, took in seconds.items() if name != "calibrate"},
        "calibrate_seconds": seconds["calibrate"],
        "constants_bytes": sum(file.stat().st_size for file in constants if file.is_file()),
        "components": {path: dict(r.components) for path, r in writer.manifest.calibration.items()},
    }


class Clock:
    """Adds up seconds between laps."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self.since
        self.start()


def read_all(reader: CacheReader, layer: int, clock: Clock) -> torch.Tensor:
    """Every row, decoded block by block as a loader does."""
    request, parts = TargetRequest(hidden_layers=(layer,)), []
    for block in range(reader.manifest.blocks):
        first, last = reader.manifest.block_range(block)
        clock.start()
        coded = reader.load_block(block, request, "plain")
        clock.lap("load")
        reader.decode(coded, 0, last - first, rotated=True)
        clock.lap("unpack")
        parts.append(reader.decode(coded, 0, last - first).hidden[layer].flatten(0, 1))
        clock.lap("decode")
    return torch.cat(parts)


def measure_error(have_ND: torch.Tensor, want_ND: torch.Tensor) -> float:
    error = sum(
        float((have - want).double().square().sum())
        for have, want in zip(have_ND.split(4096), want_ND.split(4096), strict=True)
    )
    return error / float((want_ND - want_ND.mean(dim=0)).double().square().sum())


def entropy(out: Path, manifest: Manifest, layer: int, quantisers: dict[str, Any], truth_ND: torch.Tensor) -> float:
    """Order-0 entropy of each component's codes, averaged, over the first blocks."""
    sample_ND = truth_ND[: 64 * manifest.seq_len]
    if quantisers:
        codes_DN = quantisers[f"hidden/{layer}"].quantise(sample_ND).numpy()
    else:
        reader = CacheReader.open(out, allow_unsealed=True)
        coded = reader.load_block(0, TargetRequest(hidden_layers=(layer,)), "plain")
        codes_DN = coded.arrays[f"hidden/{layer}/codes"]
    bits = []
    for codes_N in codes_DN:
        _, counts = np.unique(codes_N.view(f"i{codes_N.itemsize}"), return_counts=True)
        shares = counts / len(codes_N)
        bits.append(-(shares * np.log2(shares)).sum())
    return float(np.mean(bits))


def gaussian_bound(truth_ND: torch.Tensor, nmse: float) -> float:
    """Bits per value by reverse water-filling over the eigenvalues of the covariance (Cover & Thomas, 10.3.3)."""
    variances = torch.linalg.eigvalsh(torch.cov(truth_ND.T).double()).clamp_min(1e-12)
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (
            (level, high) if float(variances.clamp_max(level).sum()) < nmse * float(variances.sum()) else (low, level)
        )
    return float((variances / level).clamp_min(1).log2().mean() / 2)


def report(measured: list[dict[str, Any]]) -> None:
    table = Table(title="bits per value on disk; rates in 10^9 values/s on one core")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for one in measured:
        rates = [f"{one[f'{name}_values_per_second'] / 1e9:.2f}" for name in COLUMNS[6:]]
        bits = [f"{one[name]:.2f}" for name in ("bits", "entropy", "bound")]
        table.add_row(str(one["layer"]), one["precision"], *bits, f"{one['NMSE']:.3g}", *rates)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
