"""The last section of a run's report: the commands that made it, from its store on, as a shell takes them."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath

from student_train.evaluate.report.html import Html, code_block, paragraph
from student_train.evaluate.run_records import RunRecords

_OURS = ("kdcache", "kdtrain", "kdeval")
_DERIVED = re.compile(r"(?P<command>.*?); .* was made \S+ by: (?P<source>.*)", re.DOTALL)
"""What a derived store says of itself (`teacher_cache/derive/origins.py`)."""


def reproduce(records: RunRecords) -> list[Html]:
    """The commands that made the run."""
    if not records.commands:
        return [paragraph("No record names a command.", "note")]
    cache = records.origin.get("cache", {})
    stores = [each["command"] for each in cache.get("stores") or [cache] if each.get("command")]
    commands = [part for command in stores for part in _of_store(command)] + list(records.commands)
    revision = records.origin.get("git_revision")
    where = f"At revision {revision}, in" if revision else "In"
    parts = [
        paragraph(f"{where} the directory that the commands were typed in:"),
        code_block("\n".join(map(_quoted, dict.fromkeys(commands)))),
    ]
    if cache and not stores:
        shown = shlex.join(["kdcache", "info", *records.origin_settings.get("cache", ())])
        parts.append(paragraph(f"The command that built the store is in what `{shown}` prints.", "note"))
    return parts


def _of_store(command: str) -> list[str]:
    """The commands that made a store: of a derived one, what made its source first."""
    if (found := _DERIVED.fullmatch(command)) is None:
        return [command]
    return [*_of_store(found["source"]), found["command"]]


def _quoted(command: str) -> str:
    """The command with nothing in it that a shell acts on: a record may be anybody's, and what it says is typed."""
    try:
        program, *rest = shlex.split(command)
    except ValueError:
        return shlex.quote(command)
    # `python -m cli.kdtrain` is recorded as the file that Python ran, a script with where it lies
    name = PurePath(program).name.removesuffix(".py")
    return shlex.join([name if name in _OURS else program, *rest])
