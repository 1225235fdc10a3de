"""Take damage out of a store, so that the build that made it makes exactly the lost parts again.

A damaged block is dropped whole: its commit first, so that it does not exist any more, then its shards. Metadata,
teacher files, projections and variances are deleted; a build writes them again. Last go the list of commits and the
seal of the group, which is then unfinished. Being killed in between leaves damage that another run finds.

What a build cannot make again stays: a manifest, and the constants that calibration fixed (rotation, mean, step), which
all blocks are coded with. A group that has lost such a thing is left alone altogether, because a new seal would vouch
for it; but an extension that was never finished, and of which nothing says what it is, is given up. What lies where
targets lie and is part of no group, as after an extension's folder was deleted by hand, is deleted as well; any other
object that nothing accounts for stays, because it may be anybody's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from teacher_cache.format.groups import Group, is_nameless, readable_groups
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    METADATA,
    SEAL,
    TEACHER_FILES,
    commit_key,
    read_manifest,
    shard_key,
)
from teacher_cache.storage.base import Storage
from teacher_cache.threads import in_threads
from teacher_cache.verify.survey import Finding, GroupCheck
from teacher_cache.verify.unfinished import is_calibrated
from teacher_cache.verify.verify import VerifyProgress, VerifyReport, verify_store

_OF_TARGETS = re.compile(
    r"(hidden|attention)/(\d+/|zarr\.json$)|(logits|masked)/|(extensions/\d+/)?given-up/", re.ASCII
)
"""Where only arrays and constants of targets lie, and what says that some were given up."""


@dataclass(frozen=True, kw_only=True)
class EvictedGroup:
    """What was taken out of one group, whose next build makes it again; `command` is what built it."""

    name: str
    blocks: tuple[int, ...]
    objects: tuple[str, ...]
    """Keys beside those of blocks."""
    command: str


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """What was done about the findings of a check."""

    groups: tuple[EvictedGroup, ...]
    beyond_repair: tuple[Finding, ...]
    """What no build makes again: to be restored from a copy. Their groups were left alone."""
    given_up: tuple[str, ...]
    """Unfinished extensions that were deleted, because their manifest was damaged or lost."""
    left_out: tuple[str, ...]
    """Finished extensions that are not read until what others have lost is made again."""
    cleared: Mapping[str, int]
    """Sizes of objects of targets that no group has any more, by key: they were deleted, too."""


def evict_damage(storage: Storage, progress: VerifyProgress | None = None) -> tuple[VerifyReport, Eviction]:
    """Check a store and take out what is damaged, while nobody else may write it.

    Raises:
        StoreError: there is no store, or somebody is writing it.
    """
    if not storage.list():
        read_manifest(storage)  # says that there is none, before the lock makes its folder
    with storage.lock():
        report = verify_store(storage, progress)
        groups, beyond, given_up = [], [], []
        for group in report.groups:
            findings = [finding for finding in report.findings if finding.group == group.name]
            if group.prefix and is_nameless(storage, group.prefix):
                for key in storage.list(group.prefix):
                    storage.delete(key)
                given_up.append(group.name)
                continue
            lost = [finding for finding in findings if not _can_be_made_again(group.group, finding)]
            beyond += lost
            if findings and not lost and group.group is not None:
                others = [one.group for one in report.groups if one is not group and one.group is not None]
                shared = {path for other in others for path in other.arrays}
                groups.append(_evict(storage, group.group, findings, shared))
        return report, Eviction(
            groups=tuple(groups),
            beyond_repair=tuple(beyond),
            given_up=tuple(given_up),
            left_out=_left_out(report.groups, groups),
            cleared=_clear(storage, report, given_up),
        )


def _clear(storage: Storage, report: VerifyReport, given_up: Collection[str]) -> dict[str, int]:
    """Delete what an extension has left that is there no more, whose folder was deleted by hand or was given up.

    Where it is not known of some group what it has, nothing is deleted: it might be that group's.
    """
    if any(group.group is None and group.name not in given_up for group in report.groups):
        return {}
    doomed = {key: size for key, size in report.unknown.items() if _OF_TARGETS.match(key)}
    for _ in in_threads(storage.delete, doomed):
        pass
    return doomed


def _left_out(checks: Iterable[GroupCheck], evicted: Iterable[EvictedGroup]) -> tuple[str, ...]:
    """Finished groups that need what others hold, which are not."""
    unfinished = {group.name for group in evicted}
    finished = [one.group for one in checks if one.sealed and one.group is not None and one.name not in unfinished]
    readable = readable_groups(finished)
    return tuple(group.name for group in finished if group not in readable)


def _can_be_made_again(group: Group | None, finding: Finding) -> bool:
    if group is None or finding.part == "manifest":
        return False
    return finding.part not in ("metadata", "constant") or _objects_around(group, finding.key) is not None


def _objects_around(group: Group, key: str) -> list[str] | None:
    """The constants to delete together with a zarr.json or a constant's chunk; None if no build writes it again."""
    constants = group.layout.constants
    folder = next((f"{path}/" for path in constants if key.startswith(f"{path}/")), key.removesuffix(METADATA))
    if any(f"{path}/".startswith(folder) for path in group.arrays):
        return []
    paths = [path for path in constants if f"{path}/".startswith(folder)]
    return None if not paths or any(is_calibrated(group.manifest, path) for path in paths) else paths


def _evict(storage: Storage, group: Group, findings: Iterable[Finding], shared: Collection[str]) -> EvictedGroup:
    damaged = {finding.key for finding in findings}
    blocks = sorted({finding.block for finding in findings if finding.block is not None})
    for block in blocks:
        storage.delete(group.prefix + commit_key(block))
    for block in blocks:
        for spec in group.arrays.values():
            key = shard_key(spec, block)
            # what another group holds as well stays for that one, unless it is damaged
            if spec.path not in shared or key in damaged:
                storage.delete(key)
    objects = [key for finding in findings if finding.block is None for key in _objects_of(storage, group, finding)]
    for key in objects:
        storage.delete(key)
    # one that is left without a seal would say that a seal was lost
    storage.delete(group.prefix + COMMIT_HASHES)
    if group.seal is not None:
        storage.delete(group.prefix + SEAL)
    return EvictedGroup(
        name=group.name, blocks=tuple(blocks), objects=tuple(dict.fromkeys(objects)), command=group.manifest.command
    )


def _objects_of(storage: Storage, group: Group, finding: Finding) -> list[str]:
    """What to delete for one finding beside blocks, in this order."""
    if finding.part == "teacher":
        # without their list the files are written anew
        return [TEACHER_FILES, finding.key]
    if finding.part == "seal":
        return [finding.key]
    around = _objects_around(group, finding.key) or []
    return [finding.key, *(key for path in around for key in storage.list(f"{path}/"))]
