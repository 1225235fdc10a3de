"""`kdcache drop`: give up targets of a finished store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from cli.options import parse
from teacher_cache.derive.drop_settings import DropSettings
from teacher_cache.wording import format_bytes

if TYPE_CHECKING:
    from teacher_cache.derive.drop import DropReport


@dataclass(frozen=True, kw_only=True)
class DropFlags(DropSettings):
    """Give up targets of a finished store, and free what they take: the rest stays as it is, and can be read on."""

    cache: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
    """The store, a folder or an address."""
    json: bool = False
    """Print JSON."""


def drop(argv: list[str]) -> int:
    """`kdcache drop`; returns the exit code."""
    settings = parse(DropFlags, argv, "kdcache drop")
    from teacher_cache.derive.drop import drop_targets
    from teacher_cache.storage.base import open_storage

    report = drop_targets(open_storage(settings.cache), settings)
    print(json.dumps(asdict(report)) if settings.json else _in_words(report, dry_run=settings.dry_run))
    return 0


def _in_words(report: DropReport, *, dry_run: bool) -> str:
    given_up = "; ".join(f"{', '.join(names)} of {group}" for group, names in report.given_up.items())
    free = f"{format_bytes(report.freed_bytes)} in {report.freed_objects} objects"
    left = ", ".join(report.left)
    if dry_run:
        return f"{report.path}: would give up {given_up} and free {free}; left would be {left}. Nothing was changed"
    return f"{report.path}: gave up {given_up}, freed {free}; left: {left}"
