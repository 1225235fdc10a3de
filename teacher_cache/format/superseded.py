"""Groups that hold no block yet: another build may take their place, in other settings.

A block exists once it is committed, so a group without a commit is a manifest, and perhaps constants. What such a
group, or one whose folder was deleted, has left among the arrays is cleared away before another one starts there: a
build writes only those constants that it does not find. Cost: one listing per layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs, describe_targets
from teacher_cache.format.groups import Group
from teacher_cache.format.layout import block_arrays, constant_paths
from teacher_cache.format.protocol import COMMITS, METADATA, TEACHER, TEACHER_FILES
from teacher_cache.storage.local import Storage


def is_empty(storage: Storage, group: Group) -> bool:
    """Whether a group is unfinished and has no commit, not even a damaged one."""
    return group.seal is None and not storage.list(f"{group.prefix}{COMMITS}/")


def is_superseded(storage: Storage, group: Group, groups: Iterable[Group], wanted: TargetSpecs) -> bool:
    """Whether an extension is empty, no other group needs it, and its targets are asked for in other settings."""
    have = describe_targets(group.manifest.targets)
    others = describe_targets(wanted.within(group.manifest.targets)).items() - have.items()
    needed = any(one.needs & group.holds for one in groups)
    return bool(group.prefix and others and not needed and is_empty(storage, group))


def forget_extension(storage: Storage, group: Group, others: Iterable[Group]) -> None:
    """Delete an empty extension, its manifest last."""
    clear_arrays(storage, group.manifest, others)
    for key in sorted(storage.list(group.prefix), key=lambda key: key == group.prefix + METADATA):
        storage.delete(key)


def clear_arrays(storage: Storage, manifest: Manifest, others: Iterable[Group]) -> None:
    """Delete what lies where a group's arrays go and no other group's do; of a first build everything."""
    folders = _folders(manifest).difference(*(_folders(other.manifest) for other in others))
    if not manifest.inputs_held:
        storage.delete(TEACHER_FILES)
        folders = {folder.partition("/")[0] for folder in folders} | {TEACHER}
    for folder in sorted(folders):
        for key in storage.list(f"{folder}/"):
            storage.delete(key)


def _folders(manifest: Manifest) -> set[str]:
    paths = [*(spec.path for spec in block_arrays(manifest)), *constant_paths(manifest)]
    parts = [path.split("/") for path in paths]
    return {"/".join(part[: 2 if part[0] in ("hidden", "attention") else 1]) for part in parts}
