"""`kdcache drop`: a finished store gives up targets, in place; nothing that stays is read or written again.

    which group holds what -> is it needed by others? -> one new seal a group -> what it gave up is deleted

A group gets an object that says what it has given up, and then a seal that lists this and no longer what belongs to it
(`format/given_up.py`). The seal is one write: before it the store is what it was, after it what it is to be, for
whoever opens it and after a kill. What is deleted next is part of nothing any more; the same command deletes what a
killed one has left. Of an extension that gives up all of its targets the rest goes, too. Where several groups give up
something, those that need others go first, so that what can be read at any moment is a store.

Whoever has the store open goes on reading what is left. Students that were trained from it still belong to it, and a
build adds what was given up like any target that the store never had. Cost: listing the store, and a request for each
object that is deleted. Contents are not read: the new seal has the hashes of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from teacher_cache.contract.targets import describe_targets
from teacher_cache.derive.drop_settings import DropSettings
from teacher_cache.errors import StoreError, TargetsError
from teacher_cache.format.given_up import (
    GIVEN_UP,
    MASKED,
    GivenUp,
    folders_of,
    given_up_key,
    is_below,
    number_of,
    without,
    write_given_up,
)
from teacher_cache.format.groups import Group, extension_numbers, extension_prefix, read_groups, readable_groups
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import COMMIT_HASHES, EXTENSIONS, METADATA, SEAL, ObjectDigest, array_of
from teacher_cache.format.vouched import foreign, keys_to_seal
from teacher_cache.storage.base import Storage
from teacher_cache.threads import in_threads


@dataclass(frozen=True, kw_only=True)
class DropReport:
    """What was given up, by group, and what was freed; what is left, as `describe_targets` calls it."""

    path: str
    given_up: dict[str, tuple[str, ...]]
    freed_bytes: int
    freed_objects: int
    left: dict[str, str]


def drop_targets(storage: Storage, settings: DropSettings) -> DropReport:
    """Give up targets of a finished store.

    Raises:
        StoreError: there is no finished store, or somebody is writing it.
        TargetsError: it has no such target, others need one, or nothing would be left.
    """
    read_groups(storage)  # says that there is none, before the lock makes its folder
    with storage.lock():
        before = read_groups(storage)
        if not settings.dry_run:
            _finish_deleting(storage)
        if before[0].seal is None:
            raise StoreError(
                f"{storage.location!r} is unfinished, so that what it holds is still to be written: finish it first; "
                f"{before[0].how_to_finish}"
            )
        folders = _folders(storage, before, settings)
        after = [_without(group, folders.get(group.prefix, set())) for group in before]
        _refuse_what_others_need(storage, before, after)
        left = [group for group in after if _stays(group)]
        doomed = _to_delete(storage.list(), before, left)
        report = DropReport(
            path=storage.location,
            given_up={
                group.name: tuple(sorted(folder.replace("/", " ") for folder in folders[group.prefix]))
                for group in before
                if folders.get(group.prefix)
            },
            freed_bytes=sum(doomed.values()),
            freed_objects=len(doomed),
            left={name: what for group in left for name, what in describe_targets(group.manifest.targets).items()},
        )
        if not settings.dry_run:
            storage.remove_unfinished()
            for old, new in reversed(list(zip(before, after, strict=True))):
                _declare(storage, old, new)
            for keys in _in_order(doomed, [group for group in after if not _stays(group)]):
                for _ in in_threads(storage.delete, keys):
                    pass
        return report


def _folders(storage: Storage, groups: Sequence[Group], settings: DropSettings) -> dict[str, set[str]]:
    """The folders that each group gives up, by its prefix; of one that has given them up before, too."""
    if settings.extension is not None:
        prefix = extension_prefix(settings.extension)
        group = next((group for group in groups if group.prefix == prefix), None)
        if group is None:
            there = ", ".join(group.name for group in groups[1:]) or "none"
            raise TargetsError(
                f"--extension {settings.extension}: {storage.location!r} has no such extension, so there is nothing to "
                f"give up; it has {there}"
            )
        return {prefix: folders_of(group.manifest.targets)}
    found: dict[str, set[str]] = {}
    for kind, layer in settings.wanted():
        named = kind if layer is None else f"{kind}/{layer}"
        hits = 0
        for group in groups:
            asked = {
                folder
                for folder in folders_of(group.built_as.targets)
                if folder == named or (layer is None and folder.startswith(f"{kind}/"))
            }
            hits += len(asked)
            found.setdefault(group.prefix, set()).update(asked)
        if not hits and all(map(_stays, groups)):  # else a killed command has left some of them, which go now
            there = ", ".join(name for group in groups for name in describe_targets(group.manifest.targets))
            raise TargetsError(
                f"--targets {named.replace('/', ':')}: {storage.location!r} holds no such target, so there is nothing "
                f"to give up; it holds {there}"
            )
    return found


def _without(group: Group, folders: Iterable[str]) -> Group:
    """The group once it has given up these folders, and its masks where nothing in it is masked any more."""
    built, given_up = group.built_as, group.given_up.folders.union(folders)
    left = without(built, given_up)
    if MASKED in built.targets.views() and MASKED not in (*left.targets.views(), *built.inputs_held):
        given_up |= {MASKED}
    if given_up == group.given_up.folders:
        return group
    number = 0 if group.given_up.key is None else number_of(group.given_up.key, group.prefix)
    return Group.of(group.prefix, built, group.seal, GivenUp(given_up, given_up_key(group.prefix, number + 1)))


def _stays(group: Group) -> bool:
    """Whether something is left of a group: the first one holds the rows."""
    return not group.prefix or bool(group.manifest.targets)


def _refuse_what_others_need(storage: Storage, before: Sequence[Group], after: Sequence[Group]) -> None:
    left = [group for group in after if _stays(group)]
    if not any(group.manifest.targets for group in left):
        raise TargetsError(
            f"{storage.location!r} would hold no target any more: nobody could learn from it; delete the whole store "
            "instead, or keep one of its targets"
        )
    readable = readable_groups(left)
    were = {group.prefix for group in readable_groups(before)}
    held = frozenset[str]().union(*(group.holds for group in readable))
    for group in left:
        if group.prefix in were and group not in readable:
            needed = sorted(group.needs - held)
            names = ", ".join(describe_targets(group.manifest.targets))
            raise TargetsError(
                f"{storage.location!r}: {', '.join(needed)} cannot be given up, because {group.name} ({names}) is read "
                "with it: its targets would be lost, too; keep it, or name them as well"
            )


def _declare(storage: Storage, old: Group, new: Group) -> None:
    """Say that a group has given up something, with one write that decides; nothing where it has said so already."""
    key = new.given_up.key
    if key is None or new.given_up == old.given_up:
        return
    data = write_given_up(new.given_up.folders)
    storage.write(key, data)
    if old.seal is None:
        return
    objects = {name: digest for name, digest in old.seal.objects.items() if name not in foreign(new)}
    totals = {path: size for path, size in old.seal.bytes_per_array.items() if path in new.arrays}
    objects[key] = ObjectDigest.of(data)
    seal = replace(old.seal, objects=dict(sorted(objects.items())), bytes_per_array=totals)
    storage.write(new.prefix + SEAL, seal.to_bytes())


def _to_delete(sizes: dict[str, int], before: Sequence[Group], left: Sequence[Group]) -> dict[str, int]:
    """Objects that are part of nothing once the groups are what is left of them, with sizes."""
    staying = {group.prefix for group in left}
    folders = {folder for group in left for folder in group.given_up.folders}
    gone = [group for group in before if group.prefix not in staying]
    for group in gone:
        folders |= folders_of(group.built_as.targets) | {path.partition("/")[0] for path in _masks(group.layout)}
    # what was given up may have been built again, by another group
    held = {path for group in left for path in (*group.arrays, *group.layout.constants)}
    kept = {key for group in left for key in keys_to_seal(group)}
    kinds = {f"{folder.partition('/')[0]}/{METADATA}" for folder in folders}
    prefixes = (*(group.prefix for group in gone), *(f"{group.prefix}{GIVEN_UP}/" for group in left))
    return {
        key: size
        for key, size in sizes.items()
        if key not in kept
        and (key.startswith(prefixes) or key in kinds or (is_below(key, folders) and _path(key) not in held))
    }


def _finish_deleting(storage: Storage) -> None:
    """The last object of an extension that a killed command was about to delete."""
    keys = storage.list(f"{EXTENSIONS}/")
    there = tuple(map(extension_prefix, extension_numbers(keys)))
    for key in keys:
        if f"/{GIVEN_UP}/" in key and not key.startswith(there):
            storage.delete(key)


def _in_order(doomed: Iterable[str], gone: Iterable[Group]) -> Iterator[list[str]]:
    """What to delete, step by step: of an extension that is gone its seal, and last what says what the rest is."""
    rest = set(doomed)
    steps = []
    for group in gone:
        prefix = group.prefix
        manifest, seal = {prefix + METADATA}, {prefix + SEAL}
        given_up = {key for key in {*rest, group.given_up.key or SEAL} if number_of(key, prefix)}
        others = {key for key in rest if key.startswith(prefix)} - manifest - seal - given_up
        # a list of commits without a seal would say that a seal was lost
        listed = {prefix + COMMIT_HASHES}
        steps += [seal & rest, listed & rest, others - listed, manifest & rest, given_up]
        rest -= manifest | seal | given_up | others
    yield from (sorted(keys) for keys in (rest, *steps))


def _masks(layout: StoreLayout) -> list[str]:
    return [path for path in layout.arrays if path.startswith(f"{MASKED}/")]


def _path(key: str) -> str:
    """The array or constant that a key belongs to."""
    return array_of(key).removesuffix(f"/{METADATA}").removesuffix("/c")
