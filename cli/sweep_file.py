"""The file of a sweep: from `runs:` and `grid:` to the trainings they ask for, each with a name and all of its flags.

The settings of every training are made here, so that whatever is wrong with one is found before any starts. Nothing is
read but the file.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from cli.options import NOTHING, SWEEP_KEYS, by_field, flags_of, from_home, parse
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError
from teacher_cache.fields import FieldError, OpenFields, check_fields, shorten

PROG = "kdtrain"
LAUNCHER = "launcher"
EVALUATE = "evaluate"
DEFAULT_OUT = "students"
MOST_RUNS = 10_000
_OF_ALL = ("out", "resume", "dry_run", "json", LAUNCHER, EVALUATE)
_NAME = re.compile(r"\w[\w.,+=-]*")
_OWN_FILES = ("summary.json", "summary.md")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One training of a sweep: `differs` is what it does not share with all others, `flags` all of its flags."""

    name: str
    differs: Mapping[str, str]
    flags: tuple[str, ...]
    settings: TrainSettings


def _empty(value: object) -> object:
    return value or {}  # YAML's word for nothing is an empty text


_MAY_BE_EMPTY = BeforeValidator(_empty)


def _command(text: str) -> str:
    shlex.split(text)
    return text


class SweepSchema(OpenFields):
    """What the file says of the sweep itself; all else in it are flags, whose values are text or lists of it."""

    runs: Annotated[dict[str, Annotated[dict[str, Any], _MAY_BE_EMPTY]], Field(min_length=1)] = Field(
        default_factory=dict
    )
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], _MAY_BE_EMPTY] = Field(default_factory=dict)
    out: str = DEFAULT_OUT
    launcher: Annotated[str, AfterValidator(_command)] = ""


def _check(content: Mapping[str, Any], path: Path) -> None:
    try:
        check_fields(SweepSchema, content)
    except FieldError as error:
        raise SettingsError(f"{str(path)!r}: {_in_words(error)}") from error


def _in_words(error: FieldError) -> str:
    match error.place:
        case ("runs",):
            what, wanted = "'runs'", "a mapping is expected: it maps names to flags, such as `mha: {method: mha}`"
        case ("runs", name, *_):
            what, wanted = f"run {name!r}", "flags are expected: `{method: mha}`"
        case ("grid",):
            what, wanted = "'grid'", "a mapping is expected: it maps flags to lists of values, such as `seed: [0, 1]`"
        case ("grid", flag, *_):
            what, wanted = f"grid {flag!r}", "a list of values is expected: [0, 1]"
        case _:
            return f"{error}; give one line of text"
    return f"{what} is {shorten(error.value)}, where {wanted}"


def expand(content: Mapping[str, Any], path: Path, argv: Sequence[str]) -> list[SweepRun]:
    """The runs of a sweep, each with settings that go together. `argv` are the flags that are typed.

    Exits with code 2 where a key is no flag or a value none of its kind.

    Raises:
        SettingsError: `runs` or `grid` is no mapping, a name cannot be a folder's, two runs have one name or the same
            settings, or the settings of one cannot be.
    """
    _check(content, path)
    common = by_field(
        {key: value for key, value in content.items() if key not in (*SWEEP_KEYS, LAUNCHER, EVALUATE)}, path
    )
    written_out = str(common.pop("out", ""))
    out = from_home(DEFAULT_OUT if written_out in NOTHING else written_out)
    flags_typed = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    typed = {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in flags_typed}
    grid, runs = _read_grid(content, path, typed), dict[str, SweepRun]()
    bases = _read_runs(content, path)
    if (asked := len(bases) * prod(map(len, grid.values()))) > MOST_RUNS:
        raise SettingsError(
            f"{str(path)!r}: runs and grid ask for {asked} trainings, which no sweep can do: there can be "
            f"{MOST_RUNS} at most; give the grid fewer values, or make several files of it"
        )
    for base, own in bases.items():
        for values in product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            differs = {**own, **chosen}
            parts = [base, *(_name_part(flag, value) for flag, value in chosen.items())]
            name = "-".join(part for part in parts if part)
            if name in runs:
                raise SettingsError(
                    f"{str(path)!r}: two runs are called {name!r}: one would overwrite the other; rename one"
                )
            # what is typed takes the place of what is written: a flag of several values may come but once
            written = {key: value for key, value in {**common, **differs}.items() if key not in typed}
            flags, settings = _settings(name, written, path, argv)
            settings = replace(settings, out=os.path.join(settings.out if "out" in typed else out, name))  # noqa: PTH118
            shown = {key: _as_flag_value(value) for key, value in differs.items() if key not in typed}
            runs[name] = SweepRun(name=name, differs=shown, flags=(*flags, "--out", settings.out), settings=settings)
    _refuse_twins(list(runs.values()), path)
    return list(runs.values())


def _read_runs(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    if "runs" not in content:
        return {"": {}}
    runs = {}
    for name, flags in content["runs"].items():
        if not _NAME.fullmatch(name) or name in _OWN_FILES:
            raise SettingsError(
                f"{str(path)!r}: a run cannot be called {name!r}: it is the name of its folder in `out`; take letters, "
                "digits and . _ + - = , with a letter or digit first"
            )
        runs[name] = by_field(flags or {}, path)
        _refuse_shared(runs[name], f"run {name!r}", path)
    return runs


def _read_grid(content: Mapping[str, Any], path: Path, typed: set[str]) -> dict[str, list[Any]]:
    found = by_field(content.get("grid") or {}, path)
    _refuse_shared(found, "the grid", path)
    for key in sorted(typed & found.keys()):
        raise SettingsError(
            f"{str(path)!r}: --{key.replace('_', '-')} is typed and the grid varies it: runs named after its values "
            "would all have the typed one; leave it out, or take it out of the grid"
        )
    return found


def _refuse_shared(flags: Mapping[str, Any], where: str, path: Path) -> None:
    for key in _OF_ALL:
        if key in flags:
            raise SettingsError(
                f"{str(path)!r}: {where} sets {key!r}, which is of the whole sweep: put it at the top of the file"
            )


def _settings(
    name: str, written: Mapping[str, Any], path: Path, argv: Sequence[str]
) -> tuple[list[str], TrainSettings]:
    try:
        flags = [*flags_of(written, TrainSettings, path, PROG), *argv]
        return flags, parse(TrainSettings, flags, PROG)
    except SettingsError as error:
        raise SettingsError(f"{str(path)!r}, run {name!r}: {error}") from error
    except SystemExit as leaving:
        if leaving.code:
            print(f"{PROG}: that is run {name!r} of {str(path)!r}", file=sys.stderr)
        raise


def _refuse_twins(runs: Sequence[SweepRun], path: Path) -> None:
    first: dict[TrainSettings, str] = {}
    for run in runs:
        before = first.setdefault(replace(run.settings, out=""), run.name)
        if before != run.name:
            raise SettingsError(
                f"{str(path)!r}: runs {before!r} and {run.name!r} have the same settings: one student would be trained "
                "twice; take one out"
            )


def _name_part(flag: str, value: Any) -> str:
    """`3x384` for a value that speaks for itself, `seed0` for a number or a switch; only what folders may be called."""
    written = _as_flag_value(value)
    alone = not re.fullmatch(r"[-+.,\deE]*|true|false|yes|no|on|off|null|~", written, re.IGNORECASE)
    text = written if alone else f"{flag.replace('_', '-')}{written or 'default'}"
    return re.sub(r"[^\w.,+=-]+", "_", text).strip("._")


def _as_flag_value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
