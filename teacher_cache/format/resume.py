"""What a build has to do in a place: start a store there, go on with one, mend it, add targets to it, or refuse.

A block exists once it is committed. So a group without any commit is no more than a manifest and perhaps some
constants, and a build with other settings may take its place. Whatever such a group has left among the arrays is
deleted first, and likewise what is left of a group whose folder was deleted: a build does not write constants that it
finds, and would take those of the other group for its own. Cost: one listing per layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from teacher_cache.contract.manifest import Manifest, merge_manifests
from teacher_cache.contract.targets import TargetSpecs, describe_targets
from teacher_cache.errors import StoreError
from teacher_cache.format.groups import (
    Group,
    damaged_objects,
    extension_numbers,
    extension_prefix,
    read_groups,
    readable_groups,
    with_what_they_need,
)
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import (
    COMMITS,
    EXTENSIONS,
    METADATA,
    TEACHER,
    TEACHER_FILES,
    write_manifest,
)
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.base import Storage
from teacher_cache.wording import or_nothing


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
    clear_arrays(storage, group.layout, others)
    for key in sorted(storage.list(group.prefix), key=lambda key: key == group.prefix + METADATA):
        storage.delete(key)


def clear_arrays(storage: Storage, layout: StoreLayout, others: Iterable[Group]) -> None:
    """Delete what lies where a group's arrays go and no other group's do; of a first build everything."""
    folders = _folders(layout).difference(*(_folders(other.layout) for other in others))
    if not layout.manifest.inputs_held:
        storage.delete(TEACHER_FILES)
        folders = {folder.partition("/")[0] for folder in folders} | {TEACHER}
    for folder in sorted(folders):
        for key in storage.list(f"{folder}/"):
            storage.delete(key)


def _folders(layout: StoreLayout) -> set[str]:
    parts = [path.split("/") for path in (*layout.arrays, *layout.constants)]
    return {"/".join(part[: 2 if part[0] in ("hidden", "attention") else 1]) for part in parts}


def groups_to_build(storage: Storage, manifest: Manifest) -> list[GroupWriter]:
    """Start a store, go on with an unfinished one, or add targets to a finished one; call while the lock is held.

    Returns the groups that need work, in order: none if the store is finished and has all targets of `manifest`. A
    sealed group that has lost shards since is returned, to be unsealed once all is ready, and so is what the targets
    cannot be read without; what is added gets a group of its own. A group without a block is nothing yet: with other
    settings it is started over.

    Raises:
        StoreError: the place holds something else, a store with other settings (each one named), or a damaged one.
    """
    if not storage.list():
        return [_start(storage, "", manifest)]
    groups = read_groups(storage)
    storage.remove_unfinished()
    first = groups[0]
    # what a group has given up is added to it like any target that it never had
    if len(groups) == 1 and first.seal is None and first.given_up.key is None:
        if is_empty(storage, first) and first.manifest.differences(manifest):
            clear_arrays(storage, first.layout, [])
            return [_start(storage, "", manifest)]
        _refuse_differences(storage, groups, manifest, state="an unfinished")
        return [GroupWriter(storage, first)]
    idle = [group for group in groups if is_superseded(storage, group, groups, manifest.targets)]
    groups = [group for group in groups if group not in idle]
    have = merge_manifests([group.manifest for group in groups])
    # targets that the store has and this command does not name stay as they are
    common, others = manifest.targets.within(have.targets), have.targets.beyond(manifest.targets)
    named = replace(manifest, targets=common.united(others))
    _refuse_differences(storage, groups, named, state="a finished")
    wanted = with_what_they_need(
        storage, groups, [one for one in groups if not one.prefix or manifest.targets.within(one.manifest.targets)]
    )
    work = [writer for writer in map(partial(GroupWriter, storage), wanted) if _is_incomplete(writer)]
    lacking = manifest.targets.beyond(have.targets)
    # a new seal vouches for what is there, and what is complete is read: damage must not come under either
    checked = [writer.group for writer in work] or groups
    for group in checked:
        _refuse_damage(storage, group, contents=bool(work))
    for group in idle:
        forget_extension(storage, group, groups)
    if lacking:
        finished = readable_groups([group for group in groups if group.seal is not None])
        held = TargetSpecs()
        for group in groups:
            if group in finished or group in wanted:
                held = held.united(group.manifest.targets)
        extension = replace(manifest, targets=lacking.settled(held), calibration={}, inputs_held=held.views())
        number = max(extension_numbers(storage.list(f"{EXTENSIONS}/")), default=0) + 1
        work.append(_start(storage, extension_prefix(number), extension, groups))
    return work


def _is_incomplete(writer: GroupWriter) -> bool:
    return writer.group.seal is None or len(writer.committed()) < writer.manifest.blocks


def _refuse_damage(storage: Storage, group: Group, *, contents: bool) -> None:
    """Refuse a sealed group with damaged objects beside its blocks; without `contents`, the teacher's by size alone."""
    found = list(damaged_objects(storage, group, lambda key: contents or not key.startswith(f"{TEACHER}/")))
    for key, digest in (group.seal.objects if group.seal is not None and not contents else {}).items():
        if key.startswith(f"{TEACHER}/") and storage.size(key) != digest.size:
            found.append((key, "is missing or cut short"))
    for key, what in found:
        raise StoreError(
            f"{storage.location!r} is damaged: {key!r} {what}. What is built now would rest on it, and readers would "
            f"refuse it; restore it from a copy, or run `kdcache verify --evict {storage.location}` and this command "
            "again"
        )


def _start(storage: Storage, prefix: str, manifest: Manifest, others: Iterable[Group] = ()) -> GroupWriter:
    group = Group(prefix=prefix, manifest=manifest, seal=None)
    if prefix:
        # what one that was given up has left
        clear_arrays(storage, group.layout, others)
        for key in storage.list(prefix):
            storage.delete(key)
    # the manifest comes first, in one piece: a place that has it is ours to continue, any other is not
    write_manifest(storage, prefix, manifest)
    return GroupWriter(storage, group)


def _refuse_differences(storage: Storage, groups: Iterable[Group], wanted: Manifest, *, state: str) -> None:
    have = merge_manifests([group.manifest for group in groups])
    differences = have.differences(wanted)
    lines = "".join(
        f"\n  {name}: the store has {or_nothing(mine)}, this command asks for {or_nothing(theirs)}"
        for name, mine, theirs in differences
    )
    names = {name for name, _, _ in differences}
    hints = "".join(
        f"\n{group.name} is unfinished: {group.how_to_finish}\nTo give up its targets, delete {group.prefix!r} in the "
        "store"
        for group in groups
        if group.prefix and group.seal is None and names & describe_targets(group.manifest.targets).keys()
    )
    if lines:
        raise StoreError(
            f"{storage.location!r} is {state} store with other settings:{lines}\nMixing them would train on wrong "
            f"targets; repeat the settings of the store, or choose another --out{hints}"
        )
