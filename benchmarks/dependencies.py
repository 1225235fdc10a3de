"""What each package costs that is required, or that an extra brings: its size, its import, and which commands need it.

For every requirement of pyproject.toml: the size of its files; what installing it adds, with all that nothing else
brings; seconds to import the module that is used of it, in a fresh process and in one that has imported torch; the
commands that import it (`python -X importtime`), and whether Transformers takes it along with a model wherever it is
installed. Seconds are the processor's, which count the same on a busy machine. Commands run on a small store with the
extras out of sight, but for those of each command's own.

    python benchmarks/dependencies.py --teacher DIR --corpus FILE

On two cores that do nothing else the default takes about ten minutes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from record import print_record
from rich.console import Console
from rich.table import Table

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_OF_COMMANDS = ("all", "benchmarks", "dev", "test")
MODULES = {
    "google-crc32c": "google_crc32c",
    "matplotlib": "matplotlib.figure",
    "pyyaml": "yaml",
    "rich": "rich.console",
    "scikit-learn": "sklearn.metrics",
    "scipy": "scipy.optimize",
    "seqeval": "seqeval.metrics",
    "tensorboard": "torch.utils.tensorboard",
}
"""What is imported of a package, where that is not its own name."""
TOPS = {"tensorboard": "tensorboard"}
"""By which a package is known in a process, where that is not the first part of its module."""
MODEL = "import sys; from transformers import AutoModelForMaskedLM, PreTrainedModel; print(*sys.modules)"
Names = frozenset[str]
Wanted = tuple[str, Names]
"""A distribution, and the extras that are asked of it."""


def main() -> None:
    options = parse_options()
    extras = extra_requirements()
    required = [canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]]
    figures = {name: {"extra": None, **sizes(name, required)} for name in required}
    figures |= {name: {"extra": extras[name], **sizes(name, [*required, name])} for name in extras}
    figures = {name: each for name, each in figures.items() if "own_mb" in each}
    taken = set(run([sys.executable, "-c", MODEL]).stdout.split())
    for name, times in import_times(list(figures), options.rounds).items():
        figures[name] |= {**times, "with_transformers": top_of(name) in taken}
    with tempfile.TemporaryDirectory() as scratch:
        for name, commands in users(list(figures), extras, Path(scratch), options).items():
            figures[name]["imported_by"] = commands
    total = megabytes(closure(required))
    Console(width=200).print(as_table(figures, total))
    print_record("dependencies", rounds=options.rounds, total_mb=total, requirements=figures)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, help="text, one document a line")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


# ---- sizes ----------------------------------------------------------------------------------------------------------


def extra_requirements() -> dict[str, str]:
    """Each package that extras bring to commands, with the extras that do."""
    found: dict[str, list[str]] = {}
    for extra, lines in PROJECT["optional-dependencies"].items():
        for line in lines if extra not in NOT_OF_COMMANDS else ():
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(extra)
    return {name: ", ".join(names) for name, names in found.items()}


def sizes(name: str, beside: Iterable[str]) -> dict[str, Any]:
    """Of `name` among the requirements `beside`; nothing where it is not installed."""
    try:
        own = megabytes({name})
    except metadata.PackageNotFoundError:
        return {}
    added = closure(beside) - closure(one for one in beside if one != name)
    return {"own_mb": own, "adds_mb": megabytes(added), "adds": sorted(added - {name})}


def closure(roots: Iterable[str]) -> set[str]:
    """Every distribution that comes with these."""
    found: set[Wanted] = set()
    waiting: list[Wanted] = [(name, frozenset()) for name in roots]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += wanted_by(*one)
    return {name for name, _ in found}


def wanted_by(name: str, extras: Names) -> list[Wanted]:
    requirements = [Requirement(line) for line in metadata.requires(name) or []]
    return [
        (canonicalize_name(each.name), frozenset(each.extras))
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def megabytes(names: Iterable[str]) -> float:
    """Files as they are installed, compiled modules that pip wrote included."""
    files = [Path(str(file.locate())) for name in names for file in metadata.files(name) or []]
    return round(sum(file.stat().st_size for file in files if file.exists()) / 1e6, 1)


# ---- times ----------------------------------------------------------------------------------------------------------


def import_times(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds; the rounds follow one another, so that a busy moment does not fall on one package alone."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(rounds):
        for name in names:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            statement = f"import {module_of(name)}"
            taken = {"import_s": seconds_of("", statement), "after_torch_s": seconds_of("import torch", statement)}
            for key, value in taken.items():
                seconds[name].setdefault(key, []).append(value)
    return {
        name: {key: round(statistics.median(values), 3) for key, values in each.items()}
        for name, each in seconds.items()
    }


def seconds_of(before: str, statement: str) -> float:
    """Processor time of `statement` in a new process, after `before`."""
    clock = "time.process_time()"
    code = f"import time\n{before}\nt = {clock}\n{statement}\nprint({clock} - t)"
    return float(run([sys.executable, "-c", code]).stdout.split()[-1])


def hide(names: Iterable[str]) -> str:
    """Makes packages look as if they were not installed."""
    return f"sys.modules.update(dict.fromkeys({[top_of(name) for name in names]}))"


def run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that must not fail."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if result.returncode:
        raise SystemExit(f"{command}: {result.stdout}{result.stderr[-2000:]}")
    return result


def module_of(name: str) -> str:
    return MODULES.get(name, name)


def top_of(name: str) -> str:
    return TOPS.get(name, module_of(name).partition(".")[0])


# ---- commands -------------------------------------------------------------------------------------------------------


def users(
    names: list[str], extras: Mapping[str, str], scratch: Path, options: argparse.Namespace
) -> dict[str, list[str]]:
    """The commands that import each package, where extras are there only if the command's own."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for title, (line, own) in commands(options, scratch).items():
        print(title, file=sys.stderr, flush=True)
        hidden = [name for name, which in extras.items() if not own or own not in which.split(", ")]
        code = (
            f"import sys\n{hide(hidden)}\nsys.argv = {line!r}\nfrom cli.{line[0]} import main\nraise SystemExit(main())"
        )
        said = run([sys.executable, "-P", "-X", "importtime", "-c", code], scratch).stderr
        for name in names:
            if name not in hidden and re.search(rf"\| +{re.escape(top_of(name))}$", said, re.MULTILINE):
                found[name].append(title)
    return found


def commands(options: argparse.Namespace, scratch: Path) -> dict[str, tuple[list[str], str | None]]:
    """Every command as it is typed in `scratch`, and its extra."""
    corpus = Path(options.corpus).resolve()
    build = ["--teacher", str(Path(options.teacher).resolve()), "--corpus", str(corpus)]
    build += ["--seq-len", "32", "--max-rows", "128", "--layers", "all"]
    train = ["--steps", "2", "--batch-size", "8", "--valid-share", "0.2"]
    files = [str(write_task(corpus, scratch / f"{name}.tsv")) for name in ("train", "dev")]
    task = ["--task", "sst2", "--train-file", files[0], "--dev-file", files[1], "--seeds", "2", "--epochs", "1"]
    return {
        "plan": (["kdcache", "plan", *build], None),
        "build": (["kdcache", "build", *build], None),
        "info": (["kdcache", "info"], None),
        "verify": (["kdcache", "verify"], None),
        "derive": (["kdcache", "derive", "cache.zarr", "derived.zarr", "--targets", "hidden"], None),
        "kdtrain": (["kdtrain", "--method", "mha", *train], None),
        "kdtrain --mapping emd": (["kdtrain", "--method", "hs", "--mapping", "emd", "--out", "emd", *train], "emd"),
        "fidelity": (["kdeval", "fidelity"], None),
        "latency": (["kdeval", "latency", "--batch-sizes", "1", "--lengths", "16", "--seconds", "5"], "onnx"),
        "finetune": (["kdeval", "finetune", *task], "eval"),
        "compare": (["kdeval", "compare", "student", "emd"], None),
        "compare --out": (["kdeval", "compare", "student", "emd", "--out", "compared"], None),
        "report": (["kdeval", "report", "student", "--cache", "cache.zarr"], None),
    }


def write_task(corpus: Path, path: Path) -> Path:
    """A few lines of the corpus as sentences of either class."""
    with corpus.open(encoding="utf-8") as lines:
        sentences = [" ".join(line.split()[:16]) for line, _ in zip(lines, range(64), strict=False)]
    labelled = [f"{sentence}\t{number % 2}" for number, sentence in enumerate(sentences)]
    path.write_text("\n".join(["sentence\tlabel", *labelled]) + "\n", encoding="utf-8")
    return path


# ---- the table ------------------------------------------------------------------------------------------------------


def as_table(figures: Mapping[str, Mapping[str, Any]], total: float) -> Table:
    table = Table(title=f"requirements; {total:,.0f} MB without extras")
    for column in ("package", "extra", "MB", "adds MB", "import s", "after torch", "with Transformers"):
        table.add_column(column, justify="left" if column in ("package", "extra", "with Transformers") else "right")
    table.add_column("imported by")
    many = len({command for each in figures.values() for command in each["imported_by"]})
    for name, each in sorted(figures.items(), key=lambda item: -item[1]["adds_mb"]):
        by = "all" if len(each["imported_by"]) == many else ", ".join(each["imported_by"])
        table.add_row(
            name,
            each["extra"] or "",
            f"{each['own_mb']:,.1f}",
            f"{each['adds_mb']:,.1f}",
            f"{each['import_s']:.2f}",
            f"{each['after_torch_s']:.2f}",
            "yes" if each["with_transformers"] else "",
            by,
        )
    return table


if __name__ == "__main__":
    main()
