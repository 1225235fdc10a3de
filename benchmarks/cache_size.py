"""How much cache is enough: the same number of steps on fewer rows, read more often, and on more masked views.

`mha` and `hs` train for a fixed number of steps on all rows, on a fourth of them and on a sixteenth; `od` on all rows
with one masked view, and on a fourth of them with 1, 2 and 4 views, of which training takes another one each epoch.
Fidelity is measured on rows that none of the stores trains on, the same rows for all: relation KL for `mha`, hidden
NMSE for `hs`, output KL (in the first masked view) for `od`.

How the stores share their rows: the order of a corpus's rows does not depend on how many are kept. One store for each
method and number of views is built of --rows + --held-out rows; a store of fewer rows is derived from it as its last
ones (`kdcache derive --row-range`). So all stores end in the same rows, with the same codes, and `kdtrain
--valid-share` holds out the same rows everywhere. The script checks this, and that no training row is among them. As
in all packed text, a held-out row may go on with a document that a training row began.

What the seeds vary: only the order in which a training reads the blocks, because copied layers are the same for every
seed. Rows of a block stay together, so in large blocks the seeds would see the same batches in another order, and with
one block no difference at all. Blocks are therefore small here (--block-rows), for about 5% more bytes. The standard
deviation is that of this order alone.

Bytes are those of the rows trained on: bytes a token of the arrays, times tokens.

    python benchmarks/cache_size.py --teacher DIR --corpus FILE --out size

A training whose result is in --out is not done again. Flags that this script does not know go to kdtrain. On two CPU
cores the default takes about an hour and three quarters: 30 trainings, 15 minutes for the stores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import measure, run
from record import print_record
from rich.console import Console
from rich.table import Table
from trials import LABELS, TARGETS, figures, kept, log_bytes, train_student

from student_train.data.loader import CacheLoader
from student_train.evaluate.drawing import BLUE, LIGHT, PALETTE, new_figure, spread_labels, style_axes
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method on the `rows` last rows before the held-out ones, in so many views."""

    method: str
    rows: int
    views: int = 1

    @property
    def store(self) -> str:
        return f"{self.method}-{self.rows}-rows-{self.views}-views"


def main() -> None:
    options, further = parse_options()
    out, results = Path(options.out), []
    stores = out / "stores"
    stores.mkdir(parents=True, exist_ok=True)
    for method in options.methods.split(","):
        cases = list_cases(method, options)
        make_stores(cases, stores, options)
        check_rows(cases, stores, options.held_out)
        untrained = try_case(cases[0], 0, 0, out, options, further)
        for case in cases:
            trained = [try_case(case, options.steps, seed, out, options, further) for seed in range(options.seeds)]
            results.append(summarise(case, trained, untrained["fidelity"][method], options))
    Console(stderr=True, width=120).print(tabulate(results, options))
    plot(results, out / "cache-size.png")
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "teacher", "corpus")}
    print_record("cache_size", **chosen, further=further, cases=results)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--out", required=True, help="folder for stores, students, results and the picture")
    parser.add_argument("--methods", default="mha,hs,od")
    parser.add_argument("--rows", type=int, default=2400, help="to train on, of the largest store")
    parser.add_argument("--held-out", type=int, default=120, help="rows to measure on")
    parser.add_argument("--fewer", default="1,4,16", help="so many times fewer rows")
    parser.add_argument("--views", default="1,2,4", help="masked views for od")
    parser.add_argument("--views-fewer", type=int, default=4, help="so many times fewer rows in these views")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--block-rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--student", default="3x384", help="LAYERSxWIDTH")
    parser.add_argument("--precision", default="nmse:1e-2")
    return parser.parse_known_args()


def list_cases(method: str, options: argparse.Namespace) -> list[Case]:
    """The largest store comes first."""
    if method != "od":
        return [Case(method=method, rows=options.rows // int(times)) for times in options.fewer.split(",")]
    rows = options.rows // options.views_fewer
    several = [Case(method=method, rows=rows, views=int(views)) for views in options.views.split(",")]
    return [Case(method=method, rows=options.rows), *several]


def make_stores(cases: Sequence[Case], stores: Path, options: argparse.Namespace) -> None:
    """Build a store of all rows in each number of views, and derive those of fewer rows; what is there stays."""
    depth = options.student.split("x")[0]
    flags = ["--seq-len", str(options.seq_len), "--max-rows", str(options.rows + options.held_out)]
    flags += ["--layers", f"uniform:{depth}+last", "--precision", options.precision]
    flags += ["--block-rows", str(options.block_rows)]
    flags += ["--teacher", options.teacher, "--corpus", *options.corpus]
    wholes = {case.views: Case(method=case.method, rows=options.rows, views=case.views) for case in cases}
    for views, whole in wholes.items():
        own = ["--targets", TARGETS[whole.method], "--views", str(views)]
        run("kdcache", "build", *own, *flags, "--out", str(stores / whole.store))
    for case in cases:
        if case.rows < options.rows:
            names = [str(stores / one.store) for one in (wholes[case.views], case)]
            run("kdcache", "derive", *names, "--row-range", f"{options.rows - case.rows}:")


def check_rows(cases: Sequence[Case], stores: Path, held_out: int) -> None:
    """All stores end in the same rows with the same input, and no row is in a store twice."""
    ends = {}
    for case in cases:
        ids, inputs = read_rows(CacheReader.open(stores / case.store), masked=case.method == "od")
        assert len(ids) == case.rows + held_out == len(set(ids)), f"{case}: {len(ids)} rows, {len(set(ids))} different"
        ends[case] = ids[-held_out:], inputs[-held_out:]
    for case, end in ends.items():
        assert end == ends[cases[0]], f"{case} holds out other rows than {cases[0]}"


def read_rows(reader: CacheReader, *, masked: bool) -> tuple[list[int], list[list[int]]]:
    """Row ids, and token ids as the teacher read them in the view that students are measured in."""
    everything, ids, inputs = (range(reader.rows),), [], []
    loader = CacheLoader(
        reader, TargetRequest(masked=masked), rows=everything, batch_size=64, seed=None, stop=reader.rows
    )
    with closing(loader):
        for batch in loader:
            (targets,) = batch.views.values()
            ids += batch.row_ids
            inputs += targets.input_ids_BT.tolist()
    return ids, inputs


def try_case(
    case: Case, steps: int, seed: int, out: Path, options: argparse.Namespace, further: Sequence[str]
) -> dict[str, Any]:
    """The fidelity of one training, new or kept."""
    store, rows = out / "stores" / case.store, case.rows + options.held_out
    flags = ["--method", case.method, "--student", options.student, "--steps", str(steps), "--seed", str(seed)]
    flags += ["--batch-size", str(options.batch_size), "--valid-share", repr(options.held_out / rows)]
    flags += ["--valid-every", str(max(1, steps)), *further]
    name = f"{case.store}-seed{seed}" if steps else f"{case.method}-untrained"
    settings = {"store": CacheReader.open(store).identity_sha256, "train": flags}
    train = partial(train_and_measure, store, flags, options.held_out)
    return kept(out / "runs" / name, settings, train, finished=f"{name} done")


def train_and_measure(store: Path, flags: Sequence[str], held_out: int, folder: Path) -> dict[str, Any]:
    """The student is deleted once it is measured."""
    student = folder / "student"
    speed = train_student(store, student, *flags)
    report = measure(str(student), str(store))
    assert report.held_out and report.rows == held_out, f"measured on {report.rows} rows: {report.notes}"
    shutil.rmtree(student)
    return {"fidelity": figures(report), "train_tokens_per_second": speed}


def summarise(
    case: Case, trained: Sequence[Mapping[str, Any]], untrained: float, options: argparse.Namespace
) -> dict[str, Any]:
    info = describe_store(Path(options.out) / "stores" / case.store)
    per_token = sum(map(info.bytes_per_token, info.bytes_per_array))
    values = [one["fidelity"][case.method] for one in trained]
    return {
        "method": case.method,
        "rows": case.rows,
        "views": case.views,
        "epochs": options.steps * options.batch_size / case.rows,
        "bytes_per_token": per_token,
        "bytes": per_token * case.rows * options.seq_len,
        "untrained": untrained,
        "values": values,
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def tabulate(results: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Table:
    steps = f"{options.steps} steps of {options.batch_size} rows, {options.seeds} seeds"
    table = Table(title=f"{steps}, measured on {options.held_out} held-out rows")
    table.add_column("")
    for name in ("rows", "views", "epochs", "MB", "bytes/token", "untrained", "mean", "sd"):
        table.add_column(name, justify="right")
    for one in results:
        cells = [f"{one['rows']:,}", f"{one['views']}", f"{one['epochs']:.1f}", f"{one['bytes'] / 1e6:.2f}"]
        cells += [f"{one['bytes_per_token']:,.1f}", f"{one['untrained']:.4f}", f"{one['mean']:.4f}"]
        spread = "" if one["sd"] is None else f"{one['sd']:.4f}"
        table.add_row(f"{one['method']}: {LABELS[one['method']]}", *cells, spread)
    return table


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a method: bytes against the mean over the seeds, with standard deviations."""
    methods = list(dict.fromkeys(one["method"] for one in results))
    figure = new_figure(4.8 * len(methods), 4.2)
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        own = [one for one in results if one["method"] == method]
        draw(axes, own)
        title = f"{method}: {LABELS[method]} (lower is better; untrained {own[0]['untrained']:.3f})"
        axes.set_title(title, loc="left", fontsize=9)
    figure.savefig(path)


def draw(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    several = any(one["views"] > 1 for one in results)
    for colour, rows in zip(PALETTE, dict.fromkeys(one["rows"] for one in results), strict=False):
        own = [one for one in results if one["rows"] == rows]
        columns = zip(*((one["bytes"] / 1e6, one["mean"], one["sd"] or 0.0) for one in own), strict=True)
        sizes, means, spreads = map(list, columns)
        axes.errorbar(sizes, means, yerr=spreads, fmt="o-", color=colour if several else BLUE, capsize=3, markersize=5)
    style_axes(axes)
    log_bytes(axes, "MB of cache trained on")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    names = [f"{one['rows']:,} rows" + (f" x {one['views']} views" if several else "") for one in results]
    spread_labels(axes, [(one["bytes"] / 1e6, one["mean"], name) for one, name in zip(results, names, strict=True)])


if __name__ == "__main__":
    main()
