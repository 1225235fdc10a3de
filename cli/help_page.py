"""What `--help` of a command shows: what it is for, two examples, and its flags under headings, in short lines.

A settings record is flat. For tyro it becomes a record of records here, one for each heading, since tyro prints a box
for each; names, values and defaults of flags stay what they are in the settings. A field that begins no heading stands
under that of the field before it, so that new ones find their place by where they stand.
"""

from __future__ import annotations

import inspect
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from cli.examples import EXAMPLES

SettingsT = TypeVar("SettingsT")

_WIDTH = 100
"""Longer lines are hard to read, however wide a terminal is."""
_FIRST, _LAST = "main", "output"
_BEGINS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kdcache": {
        "teacher": ("teacher", "tokenizer"),
        "source": ("shape",),
        "text": ("corpus",),
        "rows": ("seq_len", "row_range", "max_rows"),
        "targets": ("targets", "layers", "k"),
        "run": ("batch_size", "block_rows"),
        _LAST: ("out", "json"),
    },
    "kdcache verify": {"deep check": ("deep",), "repair": ("evict",), _LAST: ("json",)},
    "kdtrain": {
        "method": ("method", "weights"),
        "cache": ("cache",),
        "student": ("student",),
        "schedule": ("steps", "seed"),
        "hardware": ("micro_batch_size", "dtype", "deepspeed", "device"),
        "optimiser": ("lr",),
        "validation": ("valid_share",),
        "checkpoint": ("on_bad_block", "resume"),
        _LAST: ("out", "dry_run"),
    },
    "kdeval": {
        "model": ("student", "teacher"),
        "rows": ("cache",),
        "task": ("task", "tasks"),
        "text": ("text", "seq_len"),
        "training": ("seeds",),
        "sizes": ("batch_sizes",),
        "run": ("batch_size", "runs", "precision", "dtype", "device"),
        _LAST: ("cache_dir", "onnx_out", "out", "json"),
    },
}
HEADINGS = {
    of: {name: heading for heading, names in begins.items() for name in names} for of, begins in _BEGINS.items()
}
"""Of a command, or of all of a program: the heading that a field begins, where it is not that of the field before."""


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of every command, for its help: `cli/entry.py` and `cli/options.py` have taken them out before."""

    config: Annotated[
        str,
        tyro.conf.arg(
            metavar="FILE.yaml",
            help="YAML with flags of this command as keys; flags that are typed override it.",
            help_behavior_hint="",
        ),
    ] = ""
    quiet: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(aliases=("-q",), help="Results, warnings and errors alone, no progress.", help_behavior_hint=""),
    ] = False
    verbose: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(aliases=("-v",), help="Say what is read and chosen, and when.", help_behavior_hint=""),
    ] = False
    debug: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="Show the traceback of an error.", help_behavior_hint=""),
    ] = False
    version: Annotated[
        tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Say what this is.", help_behavior_hint="")
    ] = False


class _Box:
    """What stands under one heading."""


def describe_command(settings_class: type[Any], prog: str) -> str:
    """What stands above the flags."""
    width = min(_WIDTH, shutil.get_terminal_size().columns)
    paragraphs = (inspect.getdoc(settings_class) or "").split("\n\n")
    # tyro joins lines that start with a letter
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    text = "\n\n".join(wrap.fill(" ".join(one.split())) for one in paragraphs)
    examples = "".join(f"\n  {example}" for example in EXAMPLES.get(prog, ()))
    return f"{text}\n\nexamples:{examples}" if examples else text


def describe_program(prog: str, commands: Mapping[str, str]) -> str:
    """What a program of several commands says of itself. `commands` maps each name to one line of help."""
    width, column = min(_WIDTH, shutil.get_terminal_size().columns), max(map(len, commands)) + 4
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * column)
    lines = "\n".join(wrap.fill(f"  {name:<{column - 4}}  {line}") for name, line in commands.items())
    more = textwrap.fill(
        f"`{prog} COMMAND --help` shows its flags and examples, `{prog} --completion bash` (or zsh) prints a script "
        f"that completes them, and `{prog} --version` says what this is. -q keeps progress quiet, -v tells more; "
        "progress goes to standard error, results to standard output.",
        width,
    )
    return f"usage: {prog} COMMAND ...\n\n{lines}\n\n{more}"


def flags_class(settings_class: type[Any], prog: str) -> Any:
    """A record of records with the fields of `settings_class`, to be parsed with `OmitArgPrefixes`."""
    hints, texts = get_type_hints(settings_class, include_extras=True), _texts(settings_class)
    headings = HEADINGS.get(prog) or HEADINGS.get(prog.partition(" ")[0], {})
    flat: list[Any] = []
    groups: dict[str, list[Any]] = {}
    heading = _FIRST
    for each in fields(settings_class):
        heading = headings.get(each.name, heading)
        place = flat if is_positional(hints[each.name]) else groups.setdefault(heading, [])
        place.append((each.name, _annotated(hints[each.name], texts.get(each.name, ""), each), _unset(each)))
    if _LAST in groups:
        groups[_LAST] = groups.pop(_LAST)
    nested = [
        (f"box_{number}", Annotated[_box(content), tyro.conf.arg(name=name)])
        for number, (name, content) in enumerate(groups.items())
    ]
    return make_dataclass("AllFlags", [*flat, *nested], bases=(CommonFlags,), frozen=True, kw_only=True)


def _box(content: list[Any]) -> Any:
    return make_dataclass("Box", content, bases=(_Box,), frozen=True, kw_only=True)


def settings_of(settings_class: type[SettingsT], asked: Any) -> SettingsT:
    """The settings that a record of records holds.

    Raises:
        SettingsError: they do not go together.
    """
    values: dict[str, Any] = {}
    for each in fields(asked):
        value = getattr(asked, each.name)
        values |= _content(value) if isinstance(value, _Box) else {each.name: value}
    return settings_class(**{each.name: values[each.name] for each in fields(settings_class)})  # type: ignore[arg-type]


def in_flags(settings: Any) -> str:
    """What is asked for beside the defaults: `--seq-len 128 --corpus a.txt b.txt`."""
    words = []
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value != each.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{each.name.replace('_', '-')}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words) or "all defaults"


def is_positional(hint: Any) -> bool:
    """Whether a field has no flag."""
    return tyro.conf.Positional in get_args(hint)


def _content(record: Any) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _texts(settings_class: type[Any]) -> dict[str, str]:
    """The docstring under each field, also of the classes that it inherits from, in one line."""
    found: dict[str, str] = {}
    for each in reversed(settings_class.__mro__):
        if each is not object:
            parsed = docstring_parser.parse_from_object(each)
            found |= {one.arg_name: " ".join(one.description.split()) for one in parsed.params if one.description}
    return found


def _annotated(hint: Any, text: str, of: Field[Any]) -> Any:
    """The type with its help text. What the settings say themselves, such as another name of a value, wins."""
    own, *markers = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    metavar, positional = _metavar(own), is_positional(hint)
    if positional:
        several = " ..." if get_origin(own) is tuple else ""
        metavar = f"{of.name.upper()}{several}"
        metavar = metavar if of.default is MISSING else f"[{metavar}]"
    shown = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=_default_in_words(of, positional))
    if (reading := _reading(own)) is not None:
        markers = [reading, *markers]
    return Annotated[(own, shown, *markers)]


_NUMBERS = {int: "a whole number", float: "a number"}


def _reading(hint: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How one number or choice is read, whether it may be left out or not: tyro would tell of types and of None."""
    kinds = _kinds(hint)
    if len(kinds) != 1 or not (kinds[0] in _NUMBERS or (get_origin(kinds[0]) is Literal and kinds[0] is not hint)):
        return None
    kind = kinds[0]

    def read(words: list[str]) -> Any:
        if kind not in _NUMBERS:
            return next(choice for choice in get_args(kind) if str(choice) == words[0])
        # takes back what a configuration file says
        if words == ["None"] and kind is not hint:
            return None
        try:
            return kind(words[0])
        except ValueError as error:
            raise ValueError(f"{words[0]!r} is not {_NUMBERS[kind]}") from error

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=str(_metavar(hint)),
        instance_from_str=read,
        # what stands in the settings may be a whole number where any is
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
        choices=None if kind in _NUMBERS else tuple(map(str, get_args(kind))),
    )


def _default_in_words(of: Field[Any], positional: bool) -> str | None:
    """What stands behind the text; None: as tyro has it."""
    if of.default is MISSING:
        return "(required)" if positional else None
    # a text says itself what leaving it out means, and a switch is off
    return "" if of.default is None or of.default is False or of.default == () else None


def _unset(of: Field[Any]) -> Any:
    """A field of the same default."""
    if of.default_factory is not MISSING:
        return field(default_factory=of.default_factory)
    return field() if of.default is MISSING else field(default=of.default)


def _metavar(hint: Any) -> str | None:
    """What stands after a flag, without the None that only stands for leaving it out; None: as tyro has it."""
    kinds = _kinds(hint)
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
    if len(kinds) == 1 and kinds[0] in (str, int, float):
        return str(kinds[0].__name__).upper()
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple:
        return f"{_metavar(get_args(kinds[0])[0])} ..."
    return None


def _kinds(hint: Any) -> list[Any]:
    """The types that a value may have, without the None that stands for leaving it out."""
    return [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
