"""Bits, error, relation KL and speed of every precision, on hidden states of a teacher.

The teacher reads the rows once; what it gave is then coded, written, read and decoded on one core, each precision in a
store of its own, by the code that builds and reads stores (`coders.py`). `fp8` is no precision of the store: it is what
torch makes of float8 (e4m3) with a scale per token, in the same arrays as `int8`. Lines `→ qkv` are hidden states
kept only to compute the queries, keys and values of the next layer, and coded so that the error of these counts. Bits
are those on disk (codes, scales, escapes) per component of the hidden state. The constants of a stream are counted
separately: they do not grow with the corpus. `quality.py` says what NMSE, KL, entropy and bound are.

    python benchmarks/codec.py --teacher DIR --corpus FILE --plot FILE.png

Rates are values per second, medians over rounds: `encode` rotates, rounds and packs, `write` compresses, hashes and
flushes, `load` reads from the page cache, checks SHA-256 and decompresses, `unpack` gives rotated coordinates in
float32, `decode` (of what is loaded) the hidden states themselves, or queries, keys and values. `load+unpack` is
what training needs of hidden states. `of zstd` compares it with numcodecs that only decompresses the same bytes,
measured in between: a busy machine changes this share less than it changes the rates.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from codec_plot import plot
from coders import AttentionCoder, Fp8Coder, HiddenCoder, Source, StoreCoder
from numcodecs import zstd
from quality import Layer, entropy
from record import keep_to_one_core, print_record
from recorded import RecordedTeacher
from rich.console import Console
from rich.progress import track
from rich.table import Table

from teacher_cache.build.resolve import make_manifest, plan_targets
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.sample import share_rows
from teacher_cache.contract.layers import default_relation_heads, parse_layers
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import parse_precision
from teacher_cache.corpus.corpus import pack_corpus
from teacher_cache.teacher.teacher import Teacher

PRECISIONS = ("float16", "int8", "fp8", "int4", "nmse:1e-3", "nmse:1e-2", "nmse:1e-1")
RATES = ("encode", "write", "load", "unpack", "load+unpack", "decode")
CORPUS_ROWS = 20_000
"""Rows of the build that the cost of calibration is compared with: the default of `kdcache build`."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source, layers, teacher_seconds = prepare(options, Path(scratch))
        keep_to_one_core()
        measured = []
        for layer, kind, precision in track(planned(source, layers, options.precisions), "coding"):
            coder = kind(source, layer, precision, Path(scratch) / "cache.zarr")
            measured.append(measure(coder, layers[layer], options))
            shutil.rmtree(coder.folder)
    calibration = calibration_cost(source.manifest, measured, teacher_seconds)
    report(measured, calibration)
    if options.plot is not None:
        plot(options.plot, measured, layers)
    print_record(
        "codec",
        teacher=options.teacher,
        rows=source.manifest.rows,
        seq_len=options.seq_len,
        relation_rows=options.relation_rows,
        rounds=options.rounds,
        calibration=calibration,
        measured=measured,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--relation-rows", type=int, default=32, help="the last rows, whose relations are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="PNG to draw the figures into")
    parser.add_argument("--scratch", help="folder for the stores (default: the system's temporary folder)")
    return parser.parse_args()


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[Source, dict[int, Layer], float]:
    """Let the teacher read the rows. Returns what is coded, what is compared with, and the seconds of reading."""
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
    known = sum(share_rows(len(rows), options.seq_len, teacher.record.hidden_size))
    if known + options.relation_rows > len(rows):
        raise SystemExit(
            f"calibration takes {known} of {len(rows)} rows, which leaves fewer to measure than --relation-rows "
            f"{options.relation_rows}: raise --rows"
        )
    manifest = make_manifest(settings, teacher, targets, rows, options.seq_len)
    teacher.start()
    following = [layer + 1 for layer in targets.hidden_layers() if layer < teacher.record.layers]
    projections = {layer: maps for layer in following if (maps := teacher.probe_attention(layer)) is not None}
    started = time.perf_counter()
    recorded = RecordedTeacher(teacher, rows, targets.hidden_layers(), options.seq_len, scratch)
    seconds = time.perf_counter() - started
    length_R, held = torch.from_numpy(rows.read(0, len(rows)).length_B), slice(known, len(rows))
    layers = {n: Layer(hidden, length_R, held, projections.get(n + 1)) for n, hidden in recorded.hidden.items()}
    return Source(manifest=manifest, recorded=recorded, rows=rows, projections=projections), layers, seconds


def planned(
    source: Source, layers: Iterable[int], precisions: Iterable[str]
) -> list[tuple[int, type[StoreCoder], str]]:
    """Every precision of every layer; those with a metric, in that of attention too."""
    found: list[tuple[int, type[StoreCoder], str]] = []
    for layer in layers:
        found += [
            (layer, Fp8Coder, name) if name == "fp8" else (layer, HiddenCoder, parse_precision(name))
            for name in precisions
        ]
        if layer + 1 in source.projections:
            found += [(layer, AttentionCoder, parse_precision(name)) for name in precisions if name.startswith("nmse:")]
    return found


def measure(coder: StoreCoder, layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    values = layer.hidden_RTD.numel()
    rounds = [time_steps(coder) for _ in range(options.rounds)]
    rates = {f"{name}_values_per_second": values / median(one[name] for one in rounds) for name in rounds[0]}
    nmse, relation_kl = compare(coder, layer, options.relation_rows)
    constants = [file for name in ("basis", "mean") for file in (coder.folder / coder.stream.path / name).rglob("*")]
    found = {
        "bits": coder.bits(),
        "entropy": entropy(coder.codes(), coder.stream.width),
        "bound": layer.bound(coder.target, nmse),
        "NMSE": nmse,
        "relation_kl": relation_kl,
        **rates,
        "calibrate_seconds": coder.calibrate_seconds,
    }
    if "load+unpack" in rounds[0]:
        found["share_of_zstd"] = median(one["zstd"] / one["load+unpack"] for one in rounds)
    return {
        "layer": coder.layer,
        "target": coder.target,
        "precision": coder.precision,
        **{name: value and float(f"{value:.4g}") for name, value in found.items()},
        "constants_bytes": sum(file.stat().st_size for file in constants if file.is_file()),
        "components": coder.stream.calibration and dict(coder.stream.calibration.components),
    }


def time_steps(coder: StoreCoder) -> dict[str, float]:
    """Seconds of each step over all blocks, once."""
    seconds: dict[str, float] = defaultdict(float)

    def time_step(name: str, step: Callable[..., Any], *given: Any) -> Any:
        started = time.perf_counter()
        made = step(*given)
        seconds[name] += time.perf_counter() - started
        return made

    blocks = range(coder.manifest.blocks)
    for block in blocks:
        arrays = time_step("encode", coder.encode, block)
        time_step("write", coder.write, block, arrays)
    coder.decode(coder.load(0))  # what is read once per store, such as metadata and rotations, is not part of a rate
    for block in blocks:
        coded = time_step("load", coder.load, block)
        for name in coder.steps_after_loading:
            time_step(name, getattr(coder, name), coded)
        time_step("zstd", decompress, list(coder.frames(block)))
    if "unpack" in seconds:
        seconds["load+unpack"] = seconds["load"] + seconds["unpack"]
    return seconds


def decompress(frames: list[tuple[memoryview | bytearray, int]]) -> None:
    """What is least: into memory that is at hand, without a look at a checksum."""
    room = np.empty(max(size for _, size in frames), dtype=np.uint8)
    for frame, size in frames:
        zstd.decompress(frame, room[:size])


def compare(coder: StoreCoder, layer: Layer, relation_rows: int) -> tuple[float, float | None]:
    """NMSE of the rows that calibration has not seen, and relation KL of the last of them."""
    error, last = 0.0, []
    kept = slice(coder.manifest.rows - relation_rows, coder.manifest.rows)
    for block in range(coder.manifest.blocks):
        first, stop = coder.manifest.block_range(block)
        have_BTC = torch.cat(coder.decode(coder.load(block)), dim=-1)
        error += layer.squared_error(coder.target, first, have_BTC)
        if stop > kept.start:
            last.append(have_BTC[max(0, kept.start - first) :])
    heads = default_relation_heads(coder.stream.width, coder.stream.width)
    return layer.nmse(coder.target, error), layer.relation_kl(coder.target, kept, torch.cat(last), heads)


def calibration_cost(manifest: Manifest, measured: list[dict[str, Any]], teacher_seconds: float) -> dict[str, float]:
    """What calibration adds to a build of default size and layers, as a share of the teacher's time for one view.

    Rows that the teacher reads once more, and the rest (rotations, steps, packings) on one core for each stream.
    """
    seconds = [one["calibrate_seconds"] for one in measured if one["precision"].startswith("nmse:")]
    streams = len(parse_layers(BuildSettings.layers, manifest.teacher.layers))
    again = sum(share_rows(CORPUS_ROWS, manifest.seq_len, manifest.teacher.hidden_size))
    teacher_row = teacher_seconds / manifest.rows
    other = streams * median(seconds) if seconds else 0.0
    return {
        "corpus_rows": CORPUS_ROWS,
        "rows_read_again": again,
        "streams": streams,
        "other_seconds": round(other, 3),
        "teacher_seconds_per_row": round(teacher_row, 5),
        "share_of_build": round(again / CORPUS_ROWS + other / (CORPUS_ROWS * teacher_row), 5),
    }


def report(measured: list[dict[str, Any]], calibration: dict[str, float]) -> None:
    table = Table(title="bits per value on disk; rates in 10^9 values/s on one core")
    for name in ("layer", "precision", "bits", "entropy", "bound", "NMSE", "KL", *RATES, "of zstd"):
        table.add_column(name, justify="right")
    for one in measured:
        arrow = " → qkv" if one["target"] == "attention" else ""
        rates = [one.get(f"{name}_values_per_second") for name in RATES]
        table.add_row(
            f"{one['layer']}{arrow}",
            one["precision"],
            *(f"{one[name]:.2f}" for name in ("bits", "entropy", "bound")),
            f"{one['NMSE']:.2g}",
            "–" if one["relation_kl"] is None else f"{one['relation_kl']:.2g}",
            *("–" if rate is None else f"{rate / 1e9:.2f}" for rate in rates),
            f"{one['share_of_zstd']:.2f}" if "share_of_zstd" in one else "–",
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"calibration: {calibration['share_of_build']:.1%} of the teacher's time for {CORPUS_ROWS:,} rows: "
        f"{calibration['rows_read_again']} rows that it reads once more,\n{calibration['other_seconds']:.1f} s for "
        f"{calibration['streams']} streams on one core; the teacher takes "
        f"{calibration['teacher_seconds_per_row'] * 1e3:.0f} ms a row on all cores"
    )


if __name__ == "__main__":
    main()
