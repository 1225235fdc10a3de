r"""The commands that a student was made by, for readers elsewhere: paths become the names of their files.

A command line in a record has paths of the machine that it was typed on. Names of the hub, such as
`Qwen/Qwen3-0.6B`, look like paths and stay.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PROGRAMS = ("kdcache", "kdtrain", "kdeval")
_HUB_FLAGS = frozenset({"--teacher", "--corpus", "--train-file", "--dev-file", "--test-files", "--base-model"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]*){0,2}(@[0-9.]+)?")
_FILE = re.compile(
    r"\.(txt|jsonl?|csv|tsv|parquet|gz|zst|zarr|gguf|conll|ya?ml|safetensors)(@[0-9.]+)?$", re.IGNORECASE
)
_QUOTED = re.compile(r"(?<!\w)(?P<quote>['\"])(?P<name>[^\n]*?)(?P=quote)(?!\w)")
_PLACE = re.compile(r"(?<![\w/.:~-])(?:file:/+|[A-Za-z]:[\\/]|~?[\\/]|\.{1,2}/)[^\s'\"(),;]*[\\/][^\s'\"(),;]*")
"""A path that nothing quotes, up to its first space."""
_PART = re.compile(r"\d+/\d+")
"""What --part takes."""


def portable(command: str) -> str:
    """A command line of ours without the paths in it, which become their last parts; nothing of another program's.

    What a record says is typed by whoever reads the card: words are quoted as a shell takes them.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    if not words:
        return ""
    program = Path(words[0]).name.removesuffix(".py")
    if program not in PROGRAMS:
        return ""
    found, flag = [program], ""
    for word in words[1:]:
        if word.startswith("--"):
            flag, sign, value = word.partition("=")
            found.append(f"{flag}{sign}{_without_path(value, flag)}")
        else:
            found.append(_without_path(word, flag))
    return shlex.join(found)


def without_places(note: str) -> str:
    """A note of a record without the paths in it, which become their last parts."""
    quoted = _QUOTED.sub(_without_place, note)
    return _PLACE.sub(lambda found: last_part(found.group().replace("\\", "/")), quoted)


def _without_place(found: re.Match[str]) -> str:
    name, quote = found["name"], found["quote"]
    return f"{quote}{last_part(name)}{quote}" if "/" in name and is_path(name) else found.group()


def hub_dataset(text: str) -> str | None:
    """OWNER/NAME of a text that was surely taken from the hub, without its part and weight.

    None of files, of folders, and of a name without its configuration: where a store was built, a folder may have been
    called so.
    """
    name, colon, _ = text.partition("@")[0].partition(":")
    return name if colon and _is_hub_name(text) else None


def is_path(name: str) -> bool:
    """Whether a name of a model or a text is that of a file or a folder."""
    return not _is_hub_name(name) and ("/" in name or _FILE.search(name) is not None or Path(name).exists())


def last_part(name: str) -> str:
    """The name of a file or a folder, wherever it lies."""
    return name.rstrip("/").rpartition("/")[2] or name


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not _FILE.search(name) and not Path(name).exists()


def _without_path(value: str, flag: str) -> str:
    if "/" not in value or _PART.fullmatch(value) or (flag in _HUB_FLAGS and _is_hub_name(value)):
        return value
    name, sign, place = value.partition("=")
    if sign and "/" not in name:
        return f"{name}={_without_path(place, flag)}"
    return last_part(value)
