"""How many tokens own the variance of a model's hidden states, and what an `nmse` store keeps of the others.

The model, masked or causal, reads the rows once; each layer is then calibrated, coded, written and read in a store of
its own by the code that builds and reads stores (`coders.py`). Calibration sees the first rows; errors are those of the
others. A line for each layer and precision:

    sinks      tokens that are kept beside the codes, and their share of all
    variance   what share of the variance of all tokens they own
    largest    the largest magnitude of any component
    bits       on disk, per value: codes, escapes and sinks, as `kdcache info` counts them
    error      E||x - x'||^2 / E||x - mean||^2 of ordinary tokens, those that are no sinks, on rows held out
    / target   that error by the one that was asked for, and the declared one by it

    python benchmarks/sinks.py --teacher DIR --corpus FILE --layers 8,15,22,28,30
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from coders import HiddenCoder, Source
from record import print_record
from recorded import RecordedTeacher
from rich.console import Console
from rich.progress import track
from rich.table import Table

from teacher_cache.build.inputs import Silent, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.sample import share_rows
from teacher_cache.contract.targets import parse_precision


def main() -> None:
    options = parse_options()
    settings = BuildSettings(
        teacher=options.teacher,
        corpus=tuple(options.corpus),
        seq_len=options.seq_len,
        max_rows=options.rows,
        targets="hidden",
        layers=options.layers,
    )
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    known = sum(share_rows(len(rows), options.seq_len, teacher.record.hidden_size))
    if known >= len(rows):
        raise SystemExit(f"calibration takes {known} of {len(rows)} rows, which leaves none to measure: raise --rows")
    teacher.start()
    layers = manifest.targets.hidden_layers()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        recorded = RecordedTeacher(teacher, rows, layers, options.seq_len, Path(scratch))
        source = Source(manifest=manifest, recorded=recorded, rows=rows, projections={})
        planned = [(layer, parse_precision(name)) for layer in layers for name in options.precisions]
        measured = [measure(source, *one, known, Path(scratch) / "cache.zarr") for one in track(planned, "coding")]
    report(measured)
    print_record(
        "sinks",
        teacher=options.teacher,
        model_type=teacher.record.model_type,
        rows=len(rows),
        rows_calibrated=known,
        seq_len=options.seq_len,
        measured=measured,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--precisions", nargs="+", default=["nmse:1e-2", "nmse:1e-1"])
    parser.add_argument("--scratch", help="folder for the stores (default: the system's temporary folder)")
    return parser.parse_args()


def measure(source: Source, layer: int, precision: str, known: int, folder: Path) -> dict[str, Any]:
    """One layer in one precision."""
    coder = HiddenCoder(source, layer, precision, folder)
    have, sinks, real = [], [], []
    for block in range(coder.manifest.blocks):
        coder.write(block, coder.encode(block))
        first, last = coder.manifest.block_range(block)
        targets = coder.reader.decode(coder.load(block), 0, last - first)
        have.append(targets.hidden[layer])
        sinks.append(targets.hidden_sinks[layer])
        real.append(targets.real_BT())
    have_RTD, sinks_RT, real_RT = (torch.cat(parts) for parts in (have, sinks, real))
    want_RTD = source.recorded.hidden[layer]
    ordinary_RT = real_RT & ~sinks_RT
    apart = ordinary_RT.clone()
    apart[:known] = False
    everything, ordinary = (squares(want_RTD[which]) for which in (real_RT, ordinary_RT))
    error = float((have_RTD - want_RTD)[apart].double().square().sum()) / squares(want_RTD[apart])
    calibration = coder.stream.calibration
    assert calibration is not None and coder.stream.target_nmse is not None
    found = {
        "variance_in_sinks": 1 - ordinary / everything,
        "largest": float(want_RTD[real_RT].abs().amax()),
        "bits": coder.bits(),
        "error": error,
        "error_by_target": error / coder.stream.target_nmse,
        "declared_by_target": calibration.nmse / coder.stream.target_nmse,
    }
    shutil.rmtree(folder)
    return {
        "layer": layer,
        "precision": precision,
        "tokens": int(real_RT.sum()),
        "sinks": int(sinks_RT.sum()),
        "kept_in": calibration.sinks and calibration.sinks.dtype,
        **{name: float(f"{value:.4g}") for name, value in found.items()},
    }


def squares(values_ND: torch.Tensor) -> float:
    """Sum of ||x - mean||^2."""
    exact_ND = values_ND.double()
    return float((exact_ND - exact_ND.mean(dim=0)).square().sum())


def report(measured: list[dict[str, Any]]) -> None:
    table = Table(title="tokens that own the variance, and what is kept of the others")
    names = ("layer", "precision", "sinks", "of tokens", "variance", "largest", "bits", "error", "/ target", "declared")
    for name in names:
        table.add_column(name, justify="right")
    for one in measured:
        table.add_row(
            str(one["layer"]),
            one["precision"],
            str(one["sinks"]),
            f"{one['sinks'] / one['tokens']:.2%}",
            f"{one['variance_in_sinks']:.1%}",
            f"{one['largest']:.4g}",
            f"{one['bits']:.2f}",
            f"{one['error']:.3g}",
            f"{one['error_by_target']:.2f}",
            f"{one['declared_by_target']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
