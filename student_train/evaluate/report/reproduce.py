"""The last section of a run's report: the commands that made it, from its store on, as a shell takes them."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from student_train.evaluate.making import commands_behind, store_commands
from student_train.evaluate.report.html import Html, code_block, paragraph
from student_train.evaluate.run_records import RunRecords

_OURS = ("kdcache", "kdtrain", "kdeval")


def reproduce(records: RunRecords) -> list[Html]:
    """The commands that made the run."""
    cache = records.origin.get("cache", {})
    stores = store_commands(cache)
    commands = [*commands_behind(stores, records.origin, records.folder), *records.commands]
    if not commands:
        return [paragraph("No record names a command.", "note")]
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


def _quoted(command: str) -> str:
    """The command with nothing in it that a shell acts on: a record may be anybody's, and what it says is typed."""
    try:
        program, *rest = shlex.split(command)
    except ValueError:
        return shlex.quote(command)
    # `python -m cli.kdtrain` is recorded as the file that Python ran, a script with where it lies
    name = PurePath(program).name.removesuffix(".py")
    return shlex.join([name if name in _OURS else program, *rest])
