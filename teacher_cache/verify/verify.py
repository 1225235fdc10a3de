"""Is every object of a store what was written? Everything is read and hashed; nothing is decoded or changed.

A seal vouches for its group: it holds the hash of a list of all commits' hashes and of every other object, and a commit
the hash of every shard. An unfinished group has no seal; what it has is compared with what its manifest implies, and
blocks that are not there yet are missing, not damaged. Damage in one object does not keep the others from being
checked. Objects that nothing accounts for are listed as unknown: they are nobody's, and nothing reads them.

Cost: one pass over all bytes, by a few threads (hashing is done without the interpreter lock), and one small read per
block. A store that is being built may be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from teacher_cache.format.groups import extension_numbers, extension_prefix
from teacher_cache.format.protocol import METADATA, SEAL, damage, read_manifest
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.threads import in_threads
from teacher_cache.verify.survey import Expected, Finding, GroupCheck, Survey, cannot_be_read


class VerifyProgress(Protocol):
    """What a check tells while it runs."""

    def checked(self, done: int, total: int, bytes_done: int, bytes_total: int) -> None:
        """So many objects, and bytes, have been checked."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of a check."""

    path: str
    groups: tuple[GroupCheck, ...]
    findings: tuple[Finding, ...]
    unknown: Mapping[str, int]
    """Sizes of objects that nothing accounts for."""
    objects: int
    bytes: int
    """How much was hashed."""

    @property
    def finished(self) -> bool:
        """Whether every group is sealed."""
        return all(group.sealed for group in self.groups)

    @property
    def whole(self) -> bool:
        """Whether everything is finished and as it was written."""
        return self.finished and not self.findings


def verify_store(store: str | Path | Storage, progress: VerifyProgress | None = None) -> VerifyReport:
    """Check every object of a store, given by its path or address, or as a storage. `progress` is told how far it is.

    Damage is no exception but a finding of the report: `whole` says whether everything is as it was written.

    Raises:
        StoreError: there is no store, or one of another format version; or the storage cannot be reached.
    """
    storage = open_storage(store) if isinstance(store, str | Path) else store
    sizes = storage.list()
    if METADATA not in sizes and SEAL not in sizes:
        read_manifest(storage)  # says what is there instead
    prefixes = ("", *map(extension_prefix, extension_numbers(sizes)))
    surveys = [Survey(storage, sizes, prefix) for prefix in prefixes]
    for survey in surveys:
        survey.run()
    vouched = {one.key for survey in surveys for one in survey.expected}
    for survey in surveys:
        survey.run_unsealed(vouched)
    findings = [finding for survey in surveys for finding in survey.findings]
    found = {finding.key for finding in findings}
    # what several groups share is named by the seal of each
    expected = {(one.key, one.digest): one for survey in reversed(surveys) for one in reversed(survey.expected)}
    checks = sorted((one for one in expected.values() if one.key not in found), key=lambda one: one.key)
    findings += _check(storage, checks, progress)
    accounted = vouched | {key for survey in surveys for key in survey.accounted}
    return VerifyReport(
        path=storage.location,
        groups=tuple(survey.result() for survey in surveys),
        findings=tuple(sorted(findings, key=lambda finding: finding.key)),
        unknown={key: size for key, size in sizes.items() if key not in accounted},
        objects=len(checks),
        bytes=sum(one.digest.size for one in checks),
    )


def _check(storage: Storage, checks: list[Expected], progress: VerifyProgress | None) -> Iterator[Finding]:
    """Hash objects, and yield those that are not what is expected."""

    def look(one: Expected) -> str | None:
        try:
            return damage(storage, one.key, one.digest)
        except OSError as error:
            return cannot_be_read(error)

    total, done = sum(one.digest.size for one in checks), 0
    for number, one, what in zip(count(1), checks, in_threads(look, checks), strict=False):
        done += one.digest.size
        if progress is not None:
            progress.checked(number, len(checks), done, total)
        if what is not None:
            yield Finding(key=one.key, part=one.part, group=one.group, array=one.array, block=one.block, what=what)
