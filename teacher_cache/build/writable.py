"""Can a build write where it is told to? Asked before the text is read, which may take hours."""

from __future__ import annotations

from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.format.groups import read_groups
from teacher_cache.storage.local import LocalStorage


def refuse_unwritable(storage: LocalStorage | None, wanted: TargetSpecs | None) -> None:
    """Refuse a folder in which a new or an unfinished store, or what a finished one lacks, cannot be written.

    Args:
        storage: where; None if it is not asked here.
        wanted: the targets asked for, where they are known already.

    Raises:
        StoreError, SpaceError: it cannot be written, or the place holds something else or a damaged store.
    """
    if storage is None:
        return
    groups = read_groups(storage) if storage.list() else []
    held = TargetSpecs()
    for group in groups:
        if group.seal is not None:
            held = held.united(group.manifest.targets)
    # a finished one that has all of it is left as it is, wherever it lies
    lacking = wanted is not None and wanted.beyond(held)
    if not groups or lacking or any(group.seal is None for group in groups):
        storage.refuse_unwritable()
