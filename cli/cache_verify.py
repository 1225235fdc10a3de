"""`kdcache verify`: compare a store with its checksums and, with --deep, with what the teacher computes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cli.display import StatusLine
from cli.options import parse
from teacher_cache.contract.memory_limits import check_placing
from teacher_cache.errors import DistillationError, SettingsError
from teacher_cache.wording import format_bytes, format_duration, format_ranges

if TYPE_CHECKING:
    from teacher_cache.verify.deep.deep import DeepReport
    from teacher_cache.verify.evict import EvictedGroup, Eviction
    from teacher_cache.verify.survey import Finding
    from teacher_cache.verify.verify import VerifyReport

_MOST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Check every byte of caches against their checksums. Exit code 0: whole; 1: damaged or unfinished."""

    cache: tyro.conf.Positional[tuple[str, ...]] = ("cache.zarr",)
    """Folders or addresses of the stores."""
    deep: int | None = None
    """Run the teacher again on so many rows, and compare what is stored with what it gives."""
    teacher: str | None = None
    """With --deep: the teacher's hub id or folder. Default: the copy that the store keeps."""
    device: str = "auto"
    """With --deep: cpu, cuda, cuda:N or auto."""
    device_map: Literal["auto"] | None = None
    """With --deep, auto: spread a teacher that is larger than one device over all GPUs, the CPU's memory and the disk,
    as `kdcache build` does.
    """
    max_memory: str | None = None
    """With --device-map: what weights may take of each device, such as 0:70GB,cpu:200GB. Default: nine tenths of what
    is free.
    """
    evict: bool = False
    """Delete what is damaged, so that the same `kdcache build` makes it again."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.deep is not None and self.deep < 1:
            raise SettingsError(f"--deep {self.deep!r} compares nothing: give the number of rows to compare")
        check_placing(self.device, self.device_map, self.max_memory)
        for flag, value in (("--teacher", self.teacher), ("--device-map", self.device_map)):
            if self.deep is None and value is not None:
                raise SettingsError(
                    f"{flag} does nothing without --deep: give the number of rows to compare, --deep 16"
                )


def verify(argv: list[str]) -> int:
    """`kdcache verify`; returns the exit code."""
    settings = parse(VerifySettings, argv, "kdcache verify")
    outcomes = []
    for location in settings.cache:
        outcome = _try(location, settings)
        outcomes.append(outcome)
        for line in () if settings.json else outcome.lines():
            print(line, flush=True)
    if settings.json:
        print(json.dumps([one.to_json() for one in outcomes], indent=2))
    return 0 if all(one.whole for one in outcomes) else 1


def _try(location: str, settings: VerifySettings) -> _Outcome | _Unreadable:
    """What is wrong with one store must not hide what was found, or deleted, in another."""
    try:
        return _verify(location, settings)
    except DistillationError as error:
        if len(settings.cache) == 1:
            raise
        return _Unreadable(path=location, message=str(error))


def _verify(location: str, settings: VerifySettings) -> _Outcome:
    from teacher_cache.storage.base import open_storage
    from teacher_cache.verify.evict import evict_damage
    from teacher_cache.verify.verify import verify_store

    storage, display, eviction, deep = open_storage(location), _Display(location), None, None
    if settings.evict:
        report, eviction = evict_damage(storage, display)
    else:
        report = verify_store(storage, display)
    if settings.deep is not None and not report.findings:
        from transformers.utils import logging

        from teacher_cache.models.placing import Placement
        from teacher_cache.verify.deep.deep import deep_check

        logging.disable_progress_bar()
        deep = deep_check(
            storage,
            settings.deep,
            teacher=settings.teacher,
            device=settings.device,
            placement=Placement.chosen(settings.device_map, settings.max_memory, settings.device),
            progress=display,
        )
    return _Outcome(report=report, eviction=eviction, deep=deep, deep_wanted=settings.deep is not None)


class _Display(StatusLine):
    """Progress of one store."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.location = location
        self.note(f"checking {location}")
        self.last_line = self.started

    def checked(self, done: int, total: int, bytes_done: int, bytes_total: int) -> None:
        """Show bytes, rate and remaining time."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = bytes_done / seconds
        left = format_duration((bytes_total - bytes_done) / rate) if rate else "?"
        self.show_share(
            bytes_done,
            bytes_total,
            f"{format_bytes(bytes_done)} of {format_bytes(bytes_total)}, {format_bytes(rate)}/s, {left} left",
            last=done == total,
        )

    def compared(self, done: int, total: int) -> None:
        """Show rows compared with the teacher."""
        self.show_share(done, total, f"{done}/{total} rows compared with the teacher", last=done == total)


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    """A place among several that could not be checked at all."""

    path: str
    message: str
    whole: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "whole": False, "error": self.message}

    def lines(self) -> Iterator[str]:
        yield f"{self.path}: not checked: {self.message}"


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Everything found out about one store."""

    report: VerifyReport
    eviction: Eviction | None
    deep: DeepReport | None
    deep_wanted: bool

    @property
    def whole(self) -> bool:
        return self.report.whole and (self.deep is None or self.deep.ok)

    @property
    def imported(self) -> str | None:
        """The shape of the files that the targets came from; None of what was built."""
        manifest = self.report.groups[0].manifest if self.report.groups else None
        return None if manifest is None else manifest.imported

    def to_json(self) -> dict[str, Any]:
        report = self.report
        groups = [
            {
                "name": one.name,
                "sealed": one.sealed,
                "blocks": one.blocks,
                "missing_blocks": one.missing_blocks,
                "seal_lost": one.seal_lost,
            }
            for one in report.groups
        ]
        return {
            "path": report.path,
            "whole": self.whole,
            "finished": report.finished,
            "imported": self.imported,
            "groups": groups,
            "findings": [asdict(finding) for finding in report.findings],
            "unknown": dict(report.unknown),
            "objects": report.objects,
            "bytes": report.bytes,
            "evicted": None if self.eviction is None else asdict(self.eviction),
            "deep": None if self.deep is None else {"ok": self.deep.ok, **asdict(self.deep)},
        }

    def lines(self) -> Iterator[str]:
        from teacher_cache.format.groups import LOST_SEAL  # zarr, which --help does not need

        report = self.report
        for finding in _first(report.findings):
            yield f"DAMAGED  {finding}"
        if report.unknown:
            size = format_bytes(sum(report.unknown.values()))
            names = ", ".join(map(str, _first(list(report.unknown), 3)))
            many = "1 object" if len(report.unknown) == 1 else f"{len(report.unknown)} objects"
            yield f"unknown  {many}, {size}, that nothing reads: {names}"
        for group in report.groups:
            if group.seal_lost:
                yield f"SEAL LOST  {group.prefix}seal.json: of {group.name}, {LOST_SEAL}"
            elif not group.sealed:
                missing = format_ranges(group.missing_blocks)
                lacks = f"blocks {missing} of {group.blocks}" if missing else "its seal"
                yield f"unfinished  {group.name} lacks {lacks}"
        if self.eviction is not None:
            yield from _describe_eviction(report, self.eviction)
        if self.deep is not None:
            yield from _describe_deep(self.deep)
        yield f"{report.path}: {self._verdict()}"

    def _verdict(self) -> str:
        report, found = self.report, len(self.report.findings)
        checked = f"{report.objects} objects, {format_bytes(report.bytes)} checked"
        if found:
            skipped = "; not compared with the teacher, mend it first" if self.deep_wanted else ""
            mend = "" if self.eviction is not None else "; --evict deletes what the same `kdcache build` makes again"
            return f"{found} {'object is' if found == 1 else 'objects are'} damaged ({checked}){mend}{skipped}"
        lost = [group.name for group in report.groups if group.seal_lost]
        if lost:
            return (
                f"the seal of {', '.join(lost)} is lost ({checked}), and until it is there again nothing of it is read"
            )
        if self.deep is not None and not self.deep.ok:
            return f"as it was written ({checked}), but not what the teacher gives"
        if not report.finished:
            return f"unfinished, nothing is damaged ({checked}); repeat the command that made it to complete it"
        made = "" if self.imported is None else f"; imported ({self.imported}), computed elsewhere"
        return f"whole ({checked}){made}"


def _describe_eviction(report: VerifyReport, eviction: Eviction) -> Iterator[str]:
    for group in eviction.groups:
        yield f"evicted  {_describe_evicted(group)}"
        yield f"         the command that made it makes that again: {group.command}"
    for finding in eviction.beyond_repair:
        yield (
            f"BEYOND REPAIR  {finding.key}: every block of {finding.group} depends on it and no build makes it again; "
            f"nothing of that was evicted; restore it from a copy, or delete {_whole_group(report, finding)} and build "
            "it anew"
        )
    for name in eviction.given_up:
        yield (
            f"given up  {name}: it was never finished, and its manifest is damaged or lost; a build with its targets "
            "adds them anew"
        )
    for name in eviction.left_out:
        yield f"left out  {name}: it needs what is unfinished now, and is read again once that is made"
    if eviction.cleared:
        size, many = format_bytes(sum(eviction.cleared.values())), len(eviction.cleared)
        yield f"cleared  {many} {'object' if many == 1 else 'objects'}, {size}, of targets that the store has no more"
    if not report.findings:
        yield "evicted  nothing: nothing is damaged"


def _whole_group(report: VerifyReport, finding: Finding) -> str:
    prefix = next(group.prefix for group in report.groups if group.name == finding.group)
    return f"{prefix!r} in the store" if prefix else "the store"


def _describe_evicted(group: EvictedGroup) -> str:
    parts = []
    if group.blocks:
        parts.append(f"{'block' if len(group.blocks) == 1 else 'blocks'} {format_ranges(group.blocks)}")
    parts += list(_first(group.objects, 5))
    return f"{', '.join(parts)} of {group.name}, which is unfinished now"


def _describe_deep(deep: DeepReport) -> Iterator[str]:
    yield f"{len(deep.rows)} rows again through the teacher (noise: the teacher against itself, row by row)"
    yield f"{'target':<24}{'measure':<26}{'stored':>11}{'declared':>11}{'noise':>11}  verdict"
    for one in deep.checks:
        numbers = "".join(f"{value:>11.3g}" for value in (one.stored, one.declared, one.noise))
        yield f"{one.target:<24}{one.measure:<26}{numbers}  {one.problem or 'ok'}"


def _first(values: Sequence[Any], most: int = _MOST_LINES) -> Iterator[Any]:
    """The first few values, and how many more there are."""
    yield from values[:most]
    if len(values) > most:
        yield f"... and {len(values) - most} more"
