r"""A whole comparison by one command: few stores, many students, every measurement, one table. It can be resumed.

A recipe (`benchmarks/recipes/*.yaml`) says what is compared: flags of `kdcache build`, flags that all students share, a
sweep (`runs:` or `grid:`, as `kdtrain --config` takes it) and the tasks to fine-tune on. Below `scales:` it says what
differs between the scale of the paper and one that fits two CPU cores. --teacher and --corpus of this script override
those of the recipe. With `stores:` (flags of several stores by name) each run may say which one it learns from
(`store: NAME`, else the first); fidelity is always measured against the first.

    python benchmarks/recipe.py benchmarks/recipes/methods.yaml --scale small --teacher DIR --corpus FILE \
        --task-files sst2=GLUE/SST-2/train.tsv,GLUE/SST-2/dev.tsv --out comparison

The script runs the real commands and prints each as it would be typed. What is done already is not done again: a
finished store, trained students, fine-tuning results. Fidelity and latency are measured once per student.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from record import print_record

from student_train.run_files import METRICS_NAME, read_records


def main() -> None:
    options = parse_options()
    recipe, out = read_recipe(Path(options.recipe), options.scale), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    files = dict(entry.split("=", 1) for entry in options.task_files)
    cache = recipe["cache"] | given(teacher=options.teacher, corpus=options.corpus)
    stores = {name: out / f"{name}.zarr" for name in recipe.get("stores", {"cache": {}})}
    for name, location in stores.items():
        changes = recipe.get("stores", {}).get(name, {})
        run("kdcache", "build", *as_flags(cache | changes), "--out", str(location))
    store, students = next(iter(stores.values())), out / "students"
    train(recipe, stores, students, out / "sweep.yaml")
    trained = list_students(students)
    teacher = copy_of_teacher(store, out / "teacher")
    for student in trained:
        once(student / "fidelity.json", "kdeval", "fidelity", "--student", str(student), "--cache", str(store))
    for student in one_of_each_shape(trained):
        once(student / "latency.json", "kdeval", "latency", "--student", str(student), "--teacher", str(teacher))
    for model in (teacher, *trained):
        for task, flags in recipe.get("finetune", {}).items():
            finetune(model, task, flags, files.get(task))
    run("kdeval", "compare", str(teacher), *map(str, trained), "--out", str(out / "comparison"))
    print_record(
        "recipe",
        recipe=Path(options.recipe).stem,
        scale=options.scale,
        training_memory_bytes={student.name: training_memory(student) for student in trained},
        comparison=read_comparison(out),
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--teacher", help="instead of the recipe's")
    parser.add_argument("--corpus", nargs="+", help="instead of the recipe's")
    parser.add_argument("--task-files", nargs="*", default=[], help="TASK=TRAIN,DEV: local files instead of the hub's")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def read_recipe(path: Path, scale: str) -> dict[str, Any]:
    """The recipe at a scale: its flags of `cache` and `train` added to those of all; other sections replace."""
    recipe: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    scales = recipe.pop("scales")
    if scale not in scales:
        raise SystemExit(f"{path}: there is no scale {scale!r}, only {', '.join(scales)}")
    for section, changes in scales[scale].items():
        recipe[section] = {**recipe.get(section, {}), **changes} if section in ("cache", "train") else changes
    for name, one in recipe.get("runs", {}).items():
        if one.get("store", "cache") not in recipe.get("stores", {"cache": {}}):
            raise SystemExit(f"{path}: run {name!r} learns from the store {one['store']!r}, which is not among stores:")
    return recipe


def given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def train(recipe: Mapping[str, Any], stores: Mapping[str, Path], students: Path, sweep: Path) -> None:
    """All students, by a sweep; what was trained already is left as it is."""
    locations = {name: [str(location)] for name, location in stores.items()}
    flags = recipe["train"] | {"cache": next(iter(locations.values())), "out": str(students)}
    flags |= copy.deepcopy({key: recipe[key] for key in ("runs", "grid") if key in recipe})
    for one in flags.get("runs", {}).values():
        if "store" in one:
            one["cache"] = locations[one.pop("store")]
    text = yaml.safe_dump(flags, sort_keys=False)
    sweep.write_text(text, encoding="utf-8")
    run("kdtrain", "--config", str(sweep))


def list_students(students: Path) -> list[Path]:
    """Those of the sweep: what an earlier recipe has left beside them is not compared."""
    summary = json.loads((students / "summary.json").read_text(encoding="utf-8"))
    return sorted(students / each["name"] for each in summary["runs"])


def copy_of_teacher(store: Path, folder: Path) -> Path:
    """The teacher as the store keeps it, in a folder where records may be left."""
    if not folder.exists():
        unfinished = folder.with_suffix(".partial")
        shutil.copytree(store / "teacher", unfinished, dirs_exist_ok=True)
        unfinished.replace(folder)
    return folder


def one_of_each_shape(students: Iterable[Path]) -> list[Path]:
    """Students of one shape take the same time."""
    shapes: dict[str, Path] = {}
    for student in students:
        description = json.loads((student / "provenance.json").read_text(encoding="utf-8"))["student"]["description"]
        shapes.setdefault(description.split(":")[0], student)
    return list(shapes.values())


def finetune(model: Path, task: str, flags: Mapping[str, Any], files: str | None) -> None:
    """Results are kept by the command itself."""
    command = ["kdeval", "finetune", "--student", str(model), "--task", task, *as_flags(flags)]
    if files is not None:
        train_file, dev_file = files.split(",")
        command += ["--train-file", train_file, "--dev-file", dev_file]
    run(*command)


def once(record: Path, *command: str) -> None:
    """A measurement, unless its record is newer than the model."""
    model = record.parent / "model.safetensors"
    if not record.exists() or record.stat().st_mtime < model.stat().st_mtime:
        run(*command)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """`seq_len: 128` as `--seq-len 128`; lists as several values."""
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def training_memory(student: Path) -> int | None:
    """The most that its training has taken, of the GPU if it had one; None of a student that was not trained."""
    seen = [record["memory"] for record in read_records(student / METRICS_NAME) if "memory" in record]
    return max(seen, default=None)


def read_comparison(out: Path) -> Any:
    return json.loads((out / "comparison" / "comparison.json").read_text(encoding="utf-8"))


def run(name: str, *arguments: str) -> None:
    """One of our commands, all that it prints on our standard error."""
    script = Path(sys.executable).parent / name
    print(f"$ {shlex.join([name, *arguments])}", file=sys.stderr, flush=True)
    subprocess.run([str(script), *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
