"""`kdcache derive`: a smaller store from a larger one, without the teacher."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from cli.display import BuildDisplay
from cli.entry import stops_on_sigterm
from cli.options import parse
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.wording import format_bytes


@dataclass(frozen=True, kw_only=True)
class DeriveFlags(DeriveSettings):
    """Make a smaller store from a larger one without the teacher: fewer layers, targets, ids or rows, coarser codes."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Finished store to derive from; it stays as it is."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the new store. An unfinished one of the same settings is continued."""
    json: bool = False
    """Print the result as JSON."""


def derive(argv: list[str]) -> int:
    """`kdcache derive`; returns the exit code."""
    settings = parse(DeriveFlags, argv, "kdcache derive")
    with stops_on_sigterm("kdcache derive") as stopping:
        progress = BuildDisplay(f"opening {settings.src}")
        from teacher_cache.derive.derive import derive_store

        stopping.go_on()
        report = derive_store(settings, progress)
    if settings.json:
        print(json.dumps(asdict(report)))
        return 0
    rate = report.written_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Wrote {report.written_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), {format_bytes(report.written_bytes)}; arrays {format_bytes(report.array_bytes)}, those "
        f"of {settings.src} {format_bytes(report.source_array_bytes)}"
    )
    return 0
