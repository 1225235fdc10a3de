"""One change at a time to what lies beside a model: records of training and measuring, a checkpoint's marker, a sweep.

Fields are changed as those of stores are (`tests/mutations.py`): dropped, replaced by another value, or given twice.
`Change.possible` says whether the record still is one that somebody could have measured, or asked for, which nobody can
tell from a true one. It is decided by the kind of the value alone, and by the fields that may be missing.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from tests.mutations import VALUES, Place, near, walk

MARKER, SWEEP, METRICS = "marker", "sweep", "metrics"
KINDS = ["fidelity", "finetune-sst2", "provenance", "latency", MARKER, "perplexity", SWEEP, "lm-eval", "provenance",
         METRICS, MARKER, "finetune-sst2", SWEEP]  # fmt: skip
DROPPED, TWICE = "dropped", "given twice"
MAY_LACK = re.compile(
    # what older versions did not write, or a table shows a dash for
    r"(fidelity\.(rows|distribution|notes|fingerprints)"
    r"|finetune-sst2\.(by_test|examples|learning_rates|settings|fingerprints|command)(\..*)?"
    r"|latency\.(teacher_parameters|generation|hardware|onnx_max_error|fingerprints)(\..*)?"
    r"|latency\.(measurements|generation)\.\*\.(p90_ms|p99_ms|teacher_.*)"
    r"|.*\.(command|fingerprints|notes)(\..*)?"
    r"|provenance\.(cache|settings|student|software|objective|deepspeed|held_out_rows|weights)\..*"
    r"|provenance\.(steps|git_revision|created|command|student|software|objective|deepspeed|held_out_rows)"
    r"|metrics\.\*(\.(grad_norm|memory|rows|loss|mha|hs|od|valid_mha|valid_hs|valid_od|skipped_rows))?"
    r"|lm-eval\.results\.\*(\.metrics\.\w+)?|perplexity\.text\.\*|.*\.\*)"
)
MAY_BE_NULL = re.compile(
    r"fidelity\.(rows|distribution)|perplexity\.(teacher|scores\.(teacher|student\.start|teacher\.start))"
    r"|lm-eval\.(limit|results\.\*\.(group|version|shots|examples|config_sha256|metrics\.\w+\.(stderr|higher_is_better)))"
    r"|(latency|finetune-sst2)\.(teacher_parameters|generation|hardware|onnx_max_error|by_test|examples|learning_rates)"
    r"|latency\.(measurements|generation)\.\*\.(p90_ms|p99_ms|teacher_.*)|.*\.command|metrics\.\*\.(mha|hs|od|grad_norm)"
    r"|metrics\.\*\.valid_(mha|hs|od)|.*\.(settings|objective|deepspeed|hardware|weights)\..*"
    r"|provenance\.(cache\.(path|identity_sha256|teacher\.(name|weights_sha256)))|provenance\.student\.description"
    r"|provenance\.(steps|git_revision|created)"
)

FREE = re.compile(
    # what a method says of itself, what a user gave DeepSpeed, what somebody calls a machine: anything, shown as it is
    r"provenance\.(objective|deepspeed|adapted|weights)\..*|finetune-sst2\.settings\..*|latency\.hardware\..*"
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was done to which file, where in it, and how."""

    kind: str
    path: Place
    how: str
    alike: bool
    possible: bool

    @property
    def field(self) -> str:
        """Where, without the places in lists."""
        return ".".join([self.kind, *("*" if isinstance(part, int) else str(part) for part in self.path)])

    def __str__(self) -> str:
        return f"{self.kind}: {'.'.join(map(str, self.path))} {self.how}"[:220]


def file_of(kind: str, folder: Path) -> Path:
    """Where the record of a kind lies in a copy of the folder that has a run and a sweep."""
    if kind == SWEEP:
        return folder / "sweep.yaml"
    if kind == MARKER:
        return max((folder / "run" / "checkpoints").glob("step-*")) / "complete.json"
    return folder / "run" / ("metrics.jsonl" if kind == METRICS else f"{kind}.json")


class Places:
    """All that can be changed, and the next place of each kind."""

    def __init__(self, folder: Path, seed: object) -> None:
        draw = random.Random(f"{seed}")
        self.found = {kind: list(walk(read(kind, file_of(kind, folder)))) for kind in dict.fromkeys(KINDS)}
        for places in self.found.values():
            draw.shuffle(places)
        self._next = {kind: cycle(places) for kind, places in self.found.items()}

    def change(self, draw: random.Random, folder: Path, number: int) -> Change:
        """Change the next place of the kind whose turn it is."""
        kind = KINDS[number % len(KINDS)]
        path, file = next(self._next[kind]), file_of(kind, folder)
        document, before = read(kind, file), file.read_bytes()
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        old, chance = holder[path[-1]], draw.random()
        if chance < 0.05 and kind not in (SWEEP, METRICS):
            other = json.dumps({"again": document[path[0]], "rest": draw.choice(VALUES)}, allow_nan=True)
            value = json.dumps(json.loads(other)["rest"])
            file.write_text("{" + f"{json.dumps(path[0])}: {value}, " + file.read_text().lstrip().removeprefix("{"))
            return Change(kind=kind, path=path[:1], how=f"{TWICE}, {value[:60]} too", alike=False, possible=False)
        if chance < 0.2:
            del holder[path[-1]]
            how, possible = DROPPED, True
        else:
            holder[path[-1]] = value = near(draw, old) if draw.random() < 0.3 else draw.choice(VALUES)
            how, possible = f"= {value!r}", is_alike(old, value)
        write(kind, file, document)
        change = Change(kind=kind, path=path, how=how, alike=file.read_bytes() == before, possible=possible)
        if how == DROPPED:
            possible = MAY_LACK.fullmatch(change.field) is not None
        elif how == "= None":
            possible = MAY_BE_NULL.fullmatch(change.field) is not None
        possible = possible or FREE.fullmatch(change.field) is not None
        return Change(kind=kind, path=path, how=how, alike=change.alike, possible=possible)


def is_alike(old: Any, new: Any) -> bool:
    """Whether a value is of the same kind as another: what is a count, a number, a text, a list stays one."""
    if old is None:
        return True  # what it could be is nowhere to be seen
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int):
        return isinstance(new, int) and new >= 0
    if isinstance(old, float):
        return isinstance(new, int | float) and abs(new) < 10**300 and math.isfinite(new)
    return isinstance(new, type(old))


def read(kind: str, file: Path) -> Any:
    """The document in a file."""
    if kind == SWEEP:
        return yaml.safe_load(file.read_text())
    if kind == METRICS:
        return [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(file.read_text())


def write(kind: str, file: Path, document: Any) -> None:
    """Write a document as its kind is written."""
    if kind == SWEEP:
        file.write_text(yaml.safe_dump(document, sort_keys=False))
    elif kind == METRICS:
        file.write_text("".join(json.dumps(line) + "\n" for line in document))
    else:
        file.write_text(json.dumps(document, indent=2))


def numbers(value: Any) -> Iterator[float]:
    """Every number in what JSON gives."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    for one in inside:
        yield from numbers(one)


def plain_sweep(text: str) -> list[tuple[str, list[str]]]:
    """What a sweep's file asks for, read plainly: each training's folder and its flags, sorted."""
    content = yaml.load(text, Loader=yaml.BaseLoader)
    common = {key: value for key, value in content.items() if key not in ("runs", "grid", "out", "launcher")}
    grid = content.get("grid") or {}
    combinations: list[dict[str, Any]] = [{}]
    for flag, values in grid.items():
        combinations = [{**one, flag: value} for one in combinations for value in values]
    found = []
    for own in [each or {} for each in content.get("runs", {"": {}}).values()]:
        for chosen in combinations:
            flags = []
            for key, value in {**common, **own, **chosen}.items():
                if key == "cache":
                    flags += ["--cache", *(value if isinstance(value, list) else [value])]
                elif isinstance(value, list):
                    flags.append(f"--{key.replace('_', '-')}={','.join(value)}")
                elif value not in ("", "~", "null"):
                    flags.append(f"--{key.replace('_', '-')}={value}")
            found.append((str(content.get("out", "students")), sorted(flags)))
    return found
