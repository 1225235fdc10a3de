"""What the host does for every value that a teacher gives: coding, writing, reading and deriving, before and after.

    git worktree add ../before REVISION
    python benchmarks/host_path.py --teacher DIR --corpus FILE --before ../before

The same steps run from two checkouts of the code, in processes of their own that take turns, on the same hidden states,
which the teacher gives once. Both must write the same bytes. The figures of a checkout are medians over the rounds, the
ratios medians of before / after within a round. Steps:

- `coding`: a block in memory -> its commit on the disk, on one core. In ns of the processor for each value: `product`,
  the rotation alone, which neither makes faster; `code`, all else up to the arrays of the block; `encode`, these into
  shards; `write`, hashing and the disk. `host` is the sum without the product;
- `build`: `build_cache` from the first pass to the seal, of a teacher that costs nothing;
- `load`: epochs of the training loader after the first, blocks on the host as an accelerator would get them (`read`),
  and decoded to rotated coordinates (`coordinates`);
- `derive`: `kdcache derive` from nmse:1e-3 to nmse:1e-1;
- `draws`: 24 ids at a place from logits of 49,152 ids, in microseconds a place.

torch has one thread in each of them, so that what is gained with more cores is gained by threads of our own. Where
other work takes the cores, only seconds of the processor mean anything; those of the clock are given beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

STEPS = ("coding", "build", "load", "derive", "draws")
LAYERS, BATCH_ROWS, VOCABULARY, DRAWS, PLACES = (2, 4, 6), 16, 49_152, 24, 256
EPOCHS = 8


def main() -> None:
    options = parse_options()
    if options.step:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        options.scratch = scratch
        run(options, Path.cwd(), "record")
        checkouts = {"before": Path(options.before).resolve(), "after": Path.cwd()}
        rounds = []
        for number in range(options.rounds):
            turn = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
            one: dict[str, dict[str, Any]] = {name: {} for name in checkouts}
            for step in options.only:
                for name in turn:
                    one[name] |= run(options, checkouts[name], step)
            rounds.append(one)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    report(options, rounds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--before", help="another checkout to compare with")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="nmse:1e-2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for stores (default: the system's temporary folder)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="some of the steps")
    parser.add_argument("--step", choices=("record", *STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.step and not options.before:
        parser.error("give --before, a checkout of the revision to compare with")
    return options


def run(options: argparse.Namespace, checkout: Path, step: str) -> dict[str, Any]:
    """What a process with the code of a checkout measures of one step."""
    command = [sys.executable, __file__, "--step", step]
    for name in ("teacher", "rows", "seq_len", "precision", "scratch"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(
        [*command, "--corpus", *options.corpus],
        # threads that wait for each other in a loop would count as work of the processor
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    scratch = Path(options.scratch)
    steps: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "record": record, "coding": coding, "build": build, "load": load, "derive": derive, "draws": draws,
    }  # fmt: skip
    return steps[options.step](options, scratch)


def settings_of(options: argparse.Namespace, out: Path, precision: str | None = None) -> Any:
    from teacher_cache.build.settings import BuildSettings

    return BuildSettings(
        teacher=options.teacher, corpus=tuple(options.corpus), out=str(out), seq_len=options.seq_len,
        max_rows=options.rows, targets="hidden", layers=",".join(map(str, LAYERS)), batch_size=BATCH_ROWS,
        precision=precision or options.precision,
    )  # fmt: skip


def record(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Let the teacher read the rows, and build the stores that are read from."""
    import torch

    from teacher_cache.build.build import build_cache
    from teacher_cache.teacher.teacher import Teacher

    kept: dict[bytes, dict[int, Any]] = {}
    run_teacher = Teacher.run

    def keep(self: Teacher, input_ids_BT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        outputs = run_teacher(self, input_ids_BT, *rest, **options)
        kept[input_ids_BT.numpy().tobytes()] = {layer: values.clone() for layer, values in outputs.hidden.items()}
        return outputs

    Teacher.run = keep  # type: ignore[method-assign]
    for name, precision in (("fine", "nmse:1e-3"), ("store", options.precision)):
        build_cache(settings_of(options, scratch / f"{name}.zarr", precision))
    torch.save(kept, scratch / "hidden.pt")
    return {}


def play_back(scratch: Path) -> None:
    """Teachers answer with what was recorded, at no cost."""
    import torch

    from teacher_cache.teacher.outputs import TeacherOutputs
    from teacher_cache.teacher.teacher import Teacher

    kept = torch.load(scratch / "hidden.pt")

    def answer(_: Teacher, input_ids_BT: torch.Tensor, *_rest: Any, **_options: Any) -> TeacherOutputs:
        hidden = kept[input_ids_BT.numpy().tobytes()]
        return TeacherOutputs(hidden=hidden, attention={}, final_BTD=torch.empty(0))

    Teacher.run = answer  # type: ignore[method-assign]


def coding(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every block of the store again, step by step, on one core."""
    import torch
    from record import keep_to_one_core

    from teacher_cache.build.block import compute_block
    from teacher_cache.build.inputs import Silent, read_inputs
    from teacher_cache.format.groups import read_groups
    from teacher_cache.format.protocol import array_of
    from teacher_cache.format.transforms import load_quantisers
    from teacher_cache.format.writer import GroupWriter
    from teacher_cache.storage.local import LocalStorage

    keep_to_one_core()
    play_back(scratch)
    teacher, _, rows, _ = read_inputs(settings_of(options, scratch / "none.zarr"), Silent(), lambda _: None)
    [group] = read_groups(LocalStorage(scratch / "store.zarr"))
    quantisers = load_quantisers(LocalStorage(scratch / "store.zarr"), group.layout, {})
    writer, clock = GroupWriter(LocalStorage(scratch / "again.zarr"), group), Clock()
    manifest, hashes = group.manifest, hashlib.sha256()
    for block in range(manifest.blocks):
        part = rows.read(*manifest.block_range(block))
        with torch.inference_mode():
            for first in range(0, len(part.length_B), BATCH_ROWS):
                ids_BT = torch.from_numpy(part.input_ids_BT[first : first + BATCH_ROWS]).long()
                for layer, values_BTD in teacher.run(ids_BT, None).hidden.items():  # type: ignore[arg-type]
                    one, values_HN = quantisers[f"hidden/{layer}"], values_BTD.flatten(0, 1).T
                    with clock.of("product"):
                        torch.addmm(one.offset_K1, one.weight_KH, values_HN)
        with clock.of("code"):
            arrays = compute_block(group.layout, teacher, quantisers, part, BATCH_ROWS).finish()
        with clock.of("encode"):
            shards = {array_of(key): data for key, data in writer.encode_block(block, arrays)}
        with clock.of("write"):
            hashes.update(writer.write_block(block, shards).to_bytes())
    values = options.rows * options.seq_len * manifest.teacher.hidden_size * len(LAYERS)
    steps = {name: seconds / values * 1e9 for name, seconds in clock.seconds.items()}
    steps["code"] -= steps["product"]
    steps["host"] = steps["code"] + steps["encode"] + steps["write"]
    steps["all"] = steps["host"] + steps["product"]
    return {**{f"coding, {name}": value for name, value in steps.items()}, "coding bytes": hashes.hexdigest()}


class Clock:
    """Adds up seconds of the processor by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, name: str) -> Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.process_time() - self._started


def timed(name: str, values: int, work: Callable[[], Any]) -> dict[str, float]:
    """Ns for each value, of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return {
        name: (time.process_time() - processor) / values * 1e9,
        f"{name}, clock": (time.perf_counter() - clock) / values * 1e9,
    }


def values_of(options: argparse.Namespace, scratch: Path) -> int:
    from teacher_cache.read.reader import CacheReader

    width = CacheReader.open(scratch / "store.zarr").manifest.teacher.hidden_size
    return int(options.rows * options.seq_len * width * len(LAYERS))


def build(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from teacher_cache.build.build import build_cache
    from teacher_cache.build.inputs import Silent

    play_back(scratch)
    values, out = values_of(options, scratch), scratch / "built.zarr"

    class FromBlocks(Silent):
        """Notes when the first block is safe, and what the processor had done by then."""

        started: tuple[int, float, float] | None = None

        def committed(self, rows: int, total: int, written_bytes: int) -> None:
            if rows and self.started is None:
                self.started = rows, time.process_time(), time.perf_counter()

    progress = FromBlocks()
    build_cache(settings_of(options, out), progress)
    assert progress.started is not None
    rows, processor, clock = progress.started
    values = values * (options.rows - rows) // options.rows
    found = {
        "build": (time.process_time() - processor) / values * 1e9,
        "build, clock": (time.perf_counter() - clock) / values * 1e9,
    }
    return {**found, "build bytes": taken_away(out)}


def taken_away(out: Path) -> str:
    """The hash of all commits of a store, which is deleted."""
    hashed = hashlib.sha256((out / "commits.sha256").read_bytes()).hexdigest()
    shutil.rmtree(out)
    return hashed


def load(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from student_train.data.loader import CacheLoader
    from teacher_cache.contract.batch import TargetRequest
    from teacher_cache.read.reader import CacheReader

    reader, values = CacheReader.open(scratch / "store.zarr"), values_of(options, scratch)
    request = TargetRequest(hidden_layers=LAYERS, rotated_layers=LAYERS)

    def epochs(decoded: bool, count: int = EPOCHS) -> None:
        rows, stop = (range(reader.rows),), count * reader.rows
        with CacheLoader(reader, request, rows=rows, batch_size=32, seed=0, stop=stop) as batches:
            for batch in batches:
                if decoded:
                    batch.views  # noqa: B018 - decodes it

    # what only the first epoch of a process waits for is no part of the others
    epochs(True, 1)
    return {
        **timed("read", EPOCHS * values, lambda: epochs(False)),
        **timed("coordinates", EPOCHS * values, lambda: epochs(True)),
    }


def derive(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from teacher_cache.derive.derive import derive_store
    from teacher_cache.derive.settings import DeriveSettings

    out = scratch / "derived.zarr"
    settings = DeriveSettings(src=str(scratch / "fine.zarr"), dst=str(out), precision="nmse:1e-1")
    return {
        **timed("derive", values_of(options, scratch), lambda: derive_store(settings)),
        "derive bytes": taken_away(out),
    }


def draws(_options: argparse.Namespace, _scratch: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from record import keep_to_one_core

    from teacher_cache.codecs.sparse_logits import draw_samples, sample_points

    keep_to_one_core()
    logits_PV = 3 * torch.randn(PLACES, VOCABULARY, generator=torch.Generator().manual_seed(0))
    points_PN = sample_points(0, np.arange(PLACES), 0, np.zeros(PLACES, dtype=np.int64), DRAWS)
    ids_PN = draw_samples(logits_PV, points_PN, 1.0)
    found = timed("draws", 3 * PLACES * 1000, lambda: [draw_samples(logits_PV, points_PN, 1.0) for _ in range(3)])
    return {**found, "draws bytes": hashlib.sha256(ids_PN.tobytes()).hexdigest()}


def report(options: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]]) -> None:
    from record import print_record
    from rich.console import Console
    from rich.table import Table

    names = [name for name, value in rounds[0]["after"].items() if isinstance(value, float)]
    compared = [name for name in rounds[0]["after"] if name.endswith(" bytes")]
    same = all(one["before"][name] == one["after"][name] for one in rounds for name in compared) if compared else None
    figures = {name: summary(name, rounds) for name in names}
    table = Table(title=f"ns of the processor for each value (draws: µs a place); the same bytes: {same}")
    for column in ("step", "before", "after", "before / after"):
        table.add_column(column, justify="right")
    for name, one in figures.items():
        table.add_row(name, *(f"{one[column]:.2f}" for column in ("before", "after", "ratio")))
    Console(stderr=True).print(table)
    print_record(
        "host_path",
        before=revision(Path(options.before)),
        rows=options.rows,
        seq_len=options.seq_len,
        layers=LAYERS,
        precision=options.precision,
        rounds=options.rounds,
        same_bytes=same,
        figures=figures,
    )


def summary(name: str, rounds: Iterable[dict[str, dict[str, Any]]]) -> dict[str, float]:
    pairs = [(one["before"][name], one["after"][name]) for one in rounds]
    return {
        "before": round(median(before for before, _ in pairs), 3),
        "after": round(median(after for _, after in pairs), 3),
        "ratio": round(median(before / after for before, after in pairs), 3),
    }


def revision(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
