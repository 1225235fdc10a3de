"""One change to a store at a time: a field of any of its JSON objects, numbers of a small array, a constant.

`Places` lists everything that a store has to change, kind by kind, and goes through each list before it begins anew, so
that many changes reach every field. Digests are made right afterwards (`tests/forged.py`), half of the time also what
the seal counts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.small_arrays import read_constant, write_constant
from teacher_cache.storage.local import LocalStorage
from tests.forged import edit_array, edit_checked, edit_manifest, reseal

Place = tuple[Any, ...]
VALUES: list[Any] = [
    None, 0, -1, 1, 2, 3, 2**31 - 1, 2**53, 10**12, 10**400, 0.5, 1.5, -0.0, 1e308, float("nan"), float("inf"), True,
    "", "x", "../../victim", "\x1b[31mred", "\u202ereversed", "nmse:0.1", "float16", [], [0], [[[[]]]], {},
    {"a": {"b": [None]}}, "9" * 10_000,
]  # fmt: skip
NUMBERS = [0, -1, 1, 127, 255, 999, 10**6, 2**31 - 1, -(2**31), np.nan, np.inf, -np.inf, 1e-40, 3e38]
KINDS = [*["manifest"] * 6, "seal", "commit", "teacher", *["metadata"] * 2, *["config"] * 2, *["array"] * 3,
         *["constant"] * 2]  # fmt: skip
_MOST_ENTRIES = 120
"""Of a JSON object with more entries than that (the vocabulary of a tokenizer) so many are changed."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was done: to which kind of object, which one, where in it, and how. `alike` says that nothing changed."""

    kind: str
    name: str
    path: Place
    how: str
    alike: bool

    @property
    def field(self) -> str:
        """Where, without the places in lists and the names of blocks; of numbers their array."""
        if self.kind in ("array", "constant"):
            return self.name
        return ".".join([self.kind, *("*" if isinstance(part, int) else str(part) for part in self.path)])

    def __str__(self) -> str:
        return f"{self.name}: {'.'.join(map(str, self.path))} {self.how}"[:220]


class Places:
    """All that can be changed in a store, and the next place of each kind."""

    def __init__(self, store: Path, seed: object) -> None:
        self.found = {kind: list(_places(store, kind)) for kind in dict.fromkeys(KINDS)}
        draw = random.Random(f"{seed}")
        for places in self.found.values():
            draw.shuffle(places)
        self._next = {kind: cycle(places) for kind, places in self.found.items()}

    def change(self, draw: random.Random, store: Path, number: int) -> Change:
        """Change the next place of the kind whose turn it is."""
        kind = KINDS[number * 7 % len(KINDS)]  # 7 and their number have no divisor in common
        name, path = next(self._next[kind])
        before = (store / name).read_bytes() if (store / name).is_file() else b""
        if kind == "array":
            how, alike = _change_array(draw, store, name)
        elif kind == "constant":
            how, alike = _change_constant(draw, store, name)
        else:
            how = _change_object(draw, store, kind, name, path)
            alike = (store / name).read_bytes() == before
        if kind == "seal":  # which stands above all others
            return Change(kind=kind, name=name, path=path, how=how, alike=alike)
        try:
            if kind == "manifest" and not path[1:] and draw.random() < 0.5:
                _count_alike(store, name)
            reseal(store)
        except (AttributeError, KeyError, TypeError):  # what is no list of digests has none to be made right
            how += ", not sealed again"
        return Change(kind=kind, name=name, path=path, how=how, alike=alike)


def _places(store: Path, kind: str) -> Iterator[tuple[str, Place]]:
    groups = [folder.parent for folder in (store / "seal.json", *store.glob("extensions/*/seal.json"))]
    arrays = [path.parent for path in store.rglob("zarr.json") if (path.parent / "c").exists()]
    constants = [path for path in arrays if (path / "zarr.json").read_text().count("sharding_indexed") == 0]
    if kind == "array":
        held = {path.relative_to(store).as_posix() for path in arrays} - {
            path.relative_to(store).as_posix() for path in constants
        }
        # codes may be any numbers: with others they are another store's
        yield from ((name, ()) for name in sorted(held) if "codes" not in name)
    elif kind == "constant":
        yield from ((path.relative_to(store).as_posix(), ()) for path in sorted(constants))
    else:
        files = {
            "manifest": [group / "zarr.json" for group in groups],
            "seal": [group / "seal.json" for group in groups],
            "commit": [group / "commits" / "00000001.json" for group in groups],
            "teacher": [store / "teacher.json"],
            "metadata": sorted(array / "zarr.json" for array in arrays),
            "config": sorted((store / "teacher").glob("*.json")),
        }[kind]
        for file in files:
            document = json.loads(file.read_text())
            document = document["attributes"] if kind == "manifest" else document
            for path in walk(document):
                if path != ("sha256",):
                    yield file.relative_to(store).as_posix(), path


def walk(value: Any, path: Place = ()) -> Iterator[Place]:
    """Where every value of a JSON object stands, the outer ones too."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, one in inside[:_MOST_ENTRIES]:
        yield (*path, key)
        yield from walk(one, (*path, key))


def _change_object(draw: random.Random, store: Path, kind: str, name: str, path: Place) -> str:
    said = ""

    def edit(fields: Any) -> None:
        nonlocal said
        holder = fields
        for key in path[:-1]:
            holder = holder[key]
        if draw.random() < 0.15:
            del holder[path[-1]]
            said = "dropped"
        else:
            holder[path[-1]] = value = near(draw, holder[path[-1]]) if draw.random() < 0.3 else draw.choice(VALUES)
            said = f"= {value!r}"

    if kind == "manifest":
        edit_manifest(store, edit, name.removesuffix("zarr.json"))
    elif kind in ("metadata", "config"):
        document = json.loads((store / name).read_text())
        edit(document)
        (store / name).write_text(json.dumps(document, indent=2))
    else:
        edit_checked(store / name, edit)
    return said


def near(draw: random.Random, value: Any) -> Any:
    """A value of the same type, which is more likely to be taken."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw.choice([-1, 1, 7])
    if isinstance(value, float):
        return value * draw.choice([0.5, 0.9, 2.0])
    if isinstance(value, str):
        return draw.choice([f"{value}x", value[:-1], value[::-1], "0" * len(value)])
    if isinstance(value, list):
        return draw.choice([value[:-1], [*value, *value[-1:]], value[::-1]])
    return {} if value is None else dict(list(value.items())[:-1])


def _change_array(draw: random.Random, store: Path, name: str) -> tuple[str, bool]:
    number, block, alike = draw.choice(NUMBERS), draw.randrange(3), True

    def edit(values: NDArray[Any]) -> None:
        nonlocal alike
        before = values.copy()
        _set(draw, values, number)
        alike = before.tobytes() == values.tobytes()

    edit_array(store, name, block, edit)
    return f"with {number} in block {block}", alike


def _change_constant(draw: random.Random, store: Path, name: str) -> tuple[str, bool]:
    value, number = read_constant(LocalStorage(store), name), draw.choice(NUMBERS)
    before = value
    if draw.random() < 0.5 and value.ndim:
        value = value[: draw.randrange(1, len(value) + 1)].astype(draw.choice(["float16", "float32", "float64"]))
        how = f"{value.shape} of {value.dtype}"
    else:
        value = value.copy()
        _set(draw, value, number)
        how = f"with {number}"
    write_constant(LocalStorage(store), name, value)
    return how, before.dtype == value.dtype and before.tobytes() == value.tobytes()


def _set(draw: random.Random, values: NDArray[Any], number: float) -> None:
    with np.errstate(all="ignore"):
        as_held = np.array(number).astype(values.dtype)
    if draw.random() < 0.5:
        values[...] = as_held
    else:
        values.flat[draw.randrange(values.size)] = as_held


def _count_alike(store: Path, name: str) -> None:
    """Let the seal count what the manifest counts."""
    attributes = json.loads((store / name).read_text())["attributes"]
    rows, size = attributes.get("rows"), attributes.get("block_rows")
    if type(rows) is int and type(size) is int and size > 0:
        seal = store / name.removesuffix("zarr.json") / "seal.json"
        edit_checked(seal, lambda fields: fields.update(rows=rows, blocks=-(-rows // size)))
