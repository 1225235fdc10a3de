"""The only place that reads flags and configuration files, and makes a settings record of them.

Settings are frozen dataclasses that live beside what they configure; their field docstrings are the help texts. A
`--config FILE` is YAML whose keys are flags (`seq_len` or `seq-len`); it is turned into flags that stand before the
user's own, so that what is typed always wins. Values of the file are kept as text, because YAML by itself would read
`mapping: 1:4` as the number 64. Nothing here imports torch: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from cli.help_page import describe_command, describe_program, flags_class, in_flags, is_positional, settings_of
from teacher_cache.errors import SettingsError

_log = logging.getLogger(__name__)
SettingsT = TypeVar("SettingsT")

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SEVERAL = (tuple, list)
NOTHING = ("", "~", "null")
SWEEP_KEYS = frozenset({"runs", "grid"})
"""Of a configuration file, the keys that make it a sweep of `kdtrain` (`cli/sweep.py`)."""
_MOST_CONFIG_BYTES = 2**20
_MOST_CONFIG_VALUES = 100_000
"""Far more than the flags of any sweep."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One of several commands of a program: what runs it and returns its exit code, its flags, one line of help."""

    run: Callable[[list[str]], int]
    settings: type[Any]
    line: str


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of a settings record, each with the values that it chooses from (none: any value, or a switch)."""

    choices: Mapping[str, tuple[str, ...]]
    positional: bool
    """Whether there are arguments without a flag."""


def parse(
    settings_class: type[SettingsT], argv: Sequence[str], prog: str, content: Mapping[str, Any] | None = None
) -> SettingsT:
    """The settings that `argv`, and the file after `--config` in it, ask for.

    `content` is that of the file where it has been read already: a pipe can be read only once.

    Exits with code 2 and a message where flags or the file's keys are wrong, with 0 after `--help`.

    Raises:
        SettingsError: the file cannot be read, or the values do not go together.
    """
    path, own = split_config(argv, prog)
    _refuse_repeats(own, settings_class, prog)
    if content is None:
        content = {} if path is None else read_config(path)
    flags = [] if path is None else flags_of(content, settings_class, path, prog)
    asked = tyro.cli(
        flags_class(settings_class, prog),
        args=[*map(from_home, [*flags, *own])],
        prog=prog,
        description=describe_command(settings_class, prog),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    settings = settings_of(settings_class, asked)
    _log.info("%s%s: %s", prog, "" if path is None else f" --config {path}", in_flags(settings))
    return settings


def from_home(argument: str) -> str:
    """`~/` at the start of a value as the home folder: shells leave it alone in `--out=~/student`, YAML everywhere."""
    flag, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{sign}{Path(value).expanduser()}" if value.startswith("~/") else argument


def split_config(argv: Sequence[str], prog: str) -> tuple[Path | None, list[str]]:
    """The file that `--config` in `argv` names, if any, and the other arguments.

    Exits with 2 where it names none, or several.
    """
    finder = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", metavar="FILE", action="append", default=[])
    found, own = finder.parse_known_args(list(argv))
    if len(found.config) > 1:
        _refuse(prog, f"--config is given {len(found.config)} times: one file says what is asked for; put all into one")
    return Path(found.config[0]) if found.config else None, own


def run_chosen(argv: Sequence[str], commands: Mapping[str, Command], prog: str) -> int:
    """Run the command that `argv` starts with on the rest of it; its exit code. See `choose_command`."""
    name, rest = choose_command(argv, {name: command.line for name, command in commands.items()}, prog)
    return commands[name].run(rest)


def choose_command(argv: Sequence[str], commands: Mapping[str, str], prog: str) -> tuple[str, list[str]]:
    """The command that `argv` starts with, and the rest of it. `commands` maps each name to one line of help.

    Exits with code 0 after printing the commands for `--help`, with 2 where there is no command or an unknown one.
    """
    usage = describe_program(prog, commands)
    if not argv:
        print(usage, file=sys.stderr)
        raise SystemExit(2)
    if argv[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0)
    if argv[0] not in commands:
        _refuse(prog, f"there is no command {argv[0]!r}{_nearest(argv[0], commands)}")
    return argv[0], list(argv[1:])


def list_flags(settings_class: type[Any]) -> Flags:
    """What a command takes beside the flags that all commands share."""
    hints = get_type_hints(settings_class, include_extras=True)
    flags = {_spell(field.name): hints[field.name] for field in fields(settings_class)}
    named = {flag: hint for flag, hint in flags.items() if not is_positional(hint)}
    return Flags(choices={flag: _choices(hint) for flag, hint in named.items()}, positional=len(named) < len(flags))


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, also where it may be left out."""
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return tuple(value for part in get_args(hint) for value in _choices(part))


def _refuse_repeats(argv: Sequence[str], settings_class: type[Any], prog: str) -> None:
    """A flag of several values, given twice, would silently keep the last values alone."""
    given = [argument.partition("=")[0].replace("_", "-") for argument in argv]
    for name, hint in get_type_hints(settings_class).items():
        flag = _spell(name)
        if get_origin(hint) in SEVERAL and given.count(flag) > 1:
            _refuse(prog, f"{flag} is given {given.count(flag)} times: put all its values after one {flag}")


def flags_of(content: Mapping[str, Any], settings_class: type[Any], path: Path, prog: str) -> list[str]:
    """Settings of a configuration file as flags; exits with code 2 where a key is none of `settings_class`.

    Raises:
        SettingsError: a value cannot be one.
    """
    hints = get_type_hints(settings_class, include_extras=True)
    # a positional argument has no flag to turn its key into
    valid = {field.name: hints[field.name] for field in fields(settings_class) if not is_positional(hints[field.name])}
    flags: list[str] = []
    for name, value in by_field(content, path).items():
        if name not in valid:
            _refuse(prog, f"{str(path)!r} sets {name!r}, which {prog} does not know{_nearest(name, valid)}")
        flags += _flag(name, value, valid[name], path)
    return flags


def by_field(flags: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of a file by the fields that its keys name.

    Raises:
        SettingsError: one is named twice, as `seq-len` and `seq_len`.
    """
    found: dict[str, Any] = {}
    for key, value in flags.items():
        field = str(key).replace("-", "_")
        if field in found:
            raise SettingsError(
                f"{str(path)!r}: {key!r} is given twice, with - and with _: one of them would be lost; take one out"
            )
        found[field] = value
    return found


def read_config(path: Path, flag: str = "--config") -> Mapping[str, Any]:
    """The content of a configuration file, every value as it is written; `flag` named it.

    Raises:
        SettingsError: it cannot be read, is larger than any settings, or holds none.
    """
    import yaml

    try:
        content = yaml.load(_read_text(path), Loader=_once_each(yaml.BaseLoader))  # strings only
        _refuse_expansion(content)
    except RecursionError as error:
        raise SettingsError(
            f"{flag} {str(path)!r} is nested too deeply for settings: give lines such as `seq_len: 128`"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{flag} {str(path)!r} cannot be read: {reason}; give a YAML file of flags") from error
    if content is None:  # an empty file
        return {}
    if not isinstance(content, Mapping):
        raise SettingsError(
            f"{flag} {str(path)!r} holds no settings: it must be lines such as `seq_len: 128`, with flags as keys"
        )
    return content


def _read_text(path: Path) -> str:
    with path.open("rb") as file:  # perhaps a pipe, which has no size
        data = file.read(_MOST_CONFIG_BYTES + 1)
    if len(data) > _MOST_CONFIG_BYTES:
        raise ValueError(f"it has more than {_MOST_CONFIG_BYTES} bytes, which are no flags")
    return data.decode("utf-8")


def _refuse_expansion(content: Any) -> None:
    """An alias stands for a whole value: a few lines of aliases of aliases stand for more values than memory holds."""
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        inside = [*value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else []
        seen += 1 + len(inside)
        if seen > _MOST_CONFIG_VALUES:
            raise ValueError(f"it has more than {_MOST_CONFIG_VALUES} values once every alias is filled in")
        waiting += inside


def _once_each(base: type[Any]) -> type[Any]:
    """A loader of mappings whose keys come once each: of two, YAML itself would drop the first without a word."""
    import yaml

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
            twice = next((key for key, count in keys.items() if count > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _flag(name: str, value: Any, hint: Any, path: Path) -> list[str]:
    """One setting as arguments: `--seq-len=128`, `--corpus a b`, `--json`; none where the file leaves it empty."""
    flag = _spell(name)
    if isinstance(value, Mapping) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise SettingsError(f"--config {str(path)!r} nests settings under {name!r}: give one value or a list of values")
    if value in NOTHING:
        return []
    if get_origin(hint) in SEVERAL:
        return [flag, *(value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return [f"{flag}={','.join(value)}"]
    if hint is bool:
        if value.lower() not in BOOLEANS:
            raise SettingsError(
                f"--config {str(path)!r} sets {name!r} to {value!r}: it is a switch, give true or false"
            )
        return [flag if BOOLEANS[value.lower()] else f"--no-{flag.removeprefix('--')}"]
    return [f"{flag}={value}"]


def _spell(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(known)}"


def _refuse(prog: str, message: str) -> NoReturn:
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(2)
