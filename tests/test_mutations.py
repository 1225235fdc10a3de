"""Stores changed at one place at random, with a hash chain that is right: every command gives a result or one message.

Fields of manifest, seal, commits and the list of the teacher's files are dropped or replaced, numbers of small arrays
changed. Whatever it is, no command may end in a traceback, hang, or print numbers that are none. KDCACHE_MUTATIONS says
how many are tried, KDCACHE_SEED which.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cli import kdcache, kdeval, kdtrain
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.format.small_arrays import read_constant, write_constant
from teacher_cache.storage.local import LocalStorage
from tests.forged import edit_array, edit_checked, edit_manifest, reseal

MUTATIONS = int(os.environ.get("KDCACHE_MUTATIONS", "150"))
EVERY = 4 if MUTATIONS <= 150 else 1
"""Of so many changed stores one is given to a command that takes longer."""
SEED = int(os.environ.get("KDCACHE_SEED", "0"))
MOST_BYTES = 2 * 2**30
"""Of memory, beyond what the process had before: a training of this size takes a quarter of it."""
VALUES: list[Any] = [
    None, 0, -1, 1, 2**31 - 1, 2**53, 10**12, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), True, "", "x",
    "../../victim", "\x1b[31mred", "\u202ereversed", "nmse:0.1", [], [0], [[[[]]]], {},
    {"a": {"b": [None]}}, "9" * 10_000,
]  # fmt: skip
NUMBERS = [0, -1, 1, 127, 255, 999, 10**6, 2**31 - 1, -(2**31), np.nan, np.inf, -np.inf, 1e-40, 3e38]
ARRAYS = [
    "input_ids", "length", "row_id", "document", "masked/positions", "masked/original_ids", "masked/replacement_ids",
    "masked/count", "logits/ids/low", "logits/log_probs", "logits/log_tail", "hidden/2/escapes/count",
    "hidden/2/escapes/index", "hidden/2/escapes/value", "hidden/4/scale", "segments/starts", "next/kept",
    "logits/draws/distinct", "logits/draws/counts", "logits/draws/ids/low",
]  # fmt: skip
CONSTANTS = ["basis", "mean", "step", "variance"]


def build(teacher: Path, corpus: Path, out: Path, targets: str | None = None) -> Path:
    build_cache(
        BuildSettings(
            teacher=str(teacher), corpus=(str(corpus),), out=str(out), seq_len=24, max_rows=24, block_rows=8, k=8,
            layers="2,4", attention_layer=3, precision="nmse:1e-1", targets=targets,
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def whole(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A store, and a student of it."""
    folder = tmp_path_factory.mktemp("whole")
    store = build(tiny_teacher(), tiny_corpus, folder / "cache.zarr")
    assert kdtrain.main([*training(store), "--out", str(folder / "student")]) == 0
    assert kdeval.main(["fidelity", "--student", str(folder / "student"), "--cache", str(store)]) == 0
    return store, folder / "student"


@pytest.fixture(scope="module")
def whole_causal(causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a causal teacher: segments, places of next tokens, draws."""
    return build(causal_teacher, causal_corpus, tmp_path_factory.mktemp("causal") / "cache.zarr", "logits,hidden")


def training(store: Path) -> list[str]:
    of_kind = ["--method", "mha+hs+od", "--weights", "1,0.1,1", "--mapping", "1:2,2:4"]
    if (store / "next").exists():
        of_kind = ["--method", "od"]
    return [
        "--cache", str(store), "--steps", "1", "--batch-size", "4", "--device", "cpu", "--valid-share", "0.2",
        "--warmup", "1", *of_kind,
    ]  # fmt: skip


def commands(store: Path, student: Path, folder: Path) -> dict[str, Callable[[], int]]:
    at, cache = str(store), ["--cache", str(store)]
    measured = ["--student", str(student)]
    return {
        "info": lambda: kdcache.main(["info", at, "--json"]),
        "verify": lambda: kdcache.main(["verify", at]),
        "derive": lambda: kdcache.main(["derive", at, str(folder / "derived.zarr"), "--targets", "hidden"]),
        "train": lambda: kdtrain.main([*training(store), "--out", str(folder / "trained")]),
        "fidelity": lambda: kdeval.main(["fidelity", *measured, *cache, "--json"]),
        "report": lambda: kdeval.main(["report", str(student), *cache, "--out", str(folder / "report.html")]),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON object stands, the outer ones too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


def mutate_json(draw: random.Random, fields: dict[str, Any]) -> str:
    """Drop or replace one field."""
    path = draw.choice(list(places(fields)))
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    if draw.random() < 0.2:
        del holder[path[-1]]
        return f"{path} dropped"
    value = draw.choice(VALUES)
    holder[path[-1]] = value
    return f"{path} = {value!r}"[:200]


def mutate_array(draw: random.Random, store: Path) -> str:
    """Replace some numbers of a block of an array, or one constant."""
    number = draw.choice(NUMBERS)
    streams = [path.parent for path in store.rglob("basis")]
    if draw.random() < 0.4:
        name = str(draw.choice(streams).relative_to(store) / draw.choice(CONSTANTS))
        if not (store / name).exists():
            name = "hidden/2/variance"
        value = read_constant(LocalStorage(store), name)
        if draw.random() < 0.5 and value.ndim:
            value = value[: draw.randrange(1, len(value) + 1)].astype(draw.choice(["float16", "float32", "float64"]))
        else:
            _set(draw, value, number)
        write_constant(LocalStorage(store), name, value)
        return f"{name} with {number}, {value.shape} of {value.dtype}"
    name = draw.choice([name for name in ARRAYS if (store / name / "zarr.json").exists()])
    edit_array(store, name, draw.randrange(3), lambda values: _set(draw, values, number))
    return f"{name} with {number}"


def _set(draw: random.Random, values: NDArray[Any], number: float) -> None:
    with np.errstate(all="ignore"):
        as_held = np.array(number).astype(values.dtype)
    if draw.random() < 0.5:
        values[...] = as_held
    else:
        values.flat[draw.randrange(values.size)] = as_held


def mutate(draw: random.Random, store: Path) -> str:
    kind = draw.choice(["manifest", "manifest", "manifest", "seal", "commit", "teacher", "array", "array", "array"])
    said = ""

    def edit(fields: dict[str, Any]) -> None:
        nonlocal said
        said = f"{kind}: {mutate_json(draw, fields)}"

    if kind == "array":
        said = f"{kind}: {mutate_array(draw, store)}"
        reseal(store)
    elif kind == "manifest":
        edit_manifest(store, edit)
        if draw.random() < 0.5:
            _count_alike(store)
        reseal(store)
    elif kind == "seal":
        edit_checked(store / "seal.json", edit)
    else:
        edit_checked(store / ("teacher.json" if kind == "teacher" else "commits/00000001.json"), edit)
        try:
            reseal(store)
        except (AttributeError, KeyError, TypeError):  # what is no list of digests has none to be made right
            return f"{said}, not sealed again"
    return said


def _count_alike(store: Path) -> None:
    """Let the seal count what the manifest counts."""
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]
    rows, size = attributes.get("rows"), attributes.get("block_rows")
    if type(rows) is int and type(size) is int and size > 0:
        edit_checked(store / "seal.json", lambda fields: fields.update(rows=rows, blocks=-(-rows // size)))


def test_whatever_is_changed_in_a_store_no_command_ends_in_a_traceback(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try_mutations(*whole, ["derive", "fidelity", "report", "train"], MUTATIONS, tmp_path, capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES


def test_whatever_is_changed_in_a_causal_store_no_command_ends_in_a_traceback(
    whole_causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_mutations(whole_causal, tmp_path, ["derive", "train"], MUTATIONS // 3, tmp_path, capsys)


def try_mutations(
    whole: Path, student: Path, dear: list[str], count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Change a store in so many ways, and give each to a command, some to one of those that take longer as well."""
    cheap, wrong, refused = ["info", "verify"], list[str](), 0
    for number in range(count):
        draw = random.Random(f"{SEED}-{number}")
        folder = tmp_path / str(number)
        store = Path(shutil.copytree(whole, folder / "cache.zarr"))
        what = mutate(draw, store)
        run = commands(store, student, folder)
        names = [cheap[number % 2], *([dear[number // EVERY % len(dear)]] if number % EVERY == 0 else ())]
        for name in names:
            capsys.readouterr()
            try:
                code: int | str = run[name]()
            except SystemExit as leaving:
                code = f"exit {leaving.code}"
            except BaseException as error:  # noqa: BLE001 - a traceback is what is looked for
                last = traceback.extract_tb(error.__traceback__)[-1]
                code = f"{type(error).__name__}: {str(error)[:150]} at {last.filename}:{last.lineno}"
            shown = capsys.readouterr()
            messages = [line for line in shown.err.splitlines() if line.startswith(("kdcache", "kdtrain", "kdeval"))]
            refused += code == 1
            if code not in (0, 1) or (code == 1 and len(messages) != 1 and name != "verify"):
                wrong.append(f"{number} {what}: {name} gave {code}, {messages}")
            if "nan" in shown.out.lower().split() or "\x1b[31m" in shown.out or "\u202e" in shown.out:
                wrong.append(f"{number} {what}: {name} printed {shown.out[:200]!r}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert refused > count / 3, "most of what is changed cannot be"
