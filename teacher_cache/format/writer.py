"""Writing a store: blocks that exist only once committed, and a seal for each group of targets that is whole.

Writing order is the whole protocol. A block's shards are written first, its commit object last; the commit holds the
size and SHA-256 of every shard. A block without a commit does not exist, so a build can be killed at any moment and
started again. After all blocks come a list of the hashes of all commits and the seal, which holds the hash of that list
and of every other object; readers refuse a group without it. This matters because zarr itself reads what is missing as
zeros: a deleted or swapped shard would otherwise be wrong numbers, not an error.

zarr encodes in memory, and whole objects go to the storage, which is why the bytes of a block are the same wherever the
store lies. Layout of arrays: `layout.py`. Cost: one hash over the bytes written, one small object per block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from teacher_cache.contract.manifest import Manifest, merge_manifests
from teacher_cache.contract.targets import TargetSpecs, describe_targets
from teacher_cache.errors import StoreError
from teacher_cache.format.groups import (
    Group,
    damaged_objects,
    extension_numbers,
    extension_prefix,
    read_commits,
    read_groups,
    readable_groups,
    whole_blocks,
    with_what_they_need,
)
from teacher_cache.format.layout import constant_paths
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    EXTENSIONS,
    METADATA,
    SEAL,
    TEACHER,
    TEACHER_FILES,
    Commit,
    ObjectDigest,
    Seal,
    commit_key,
    digest_object,
    list_commit_hashes,
    read_teacher_files,
    shard_key,
    write_manifest,
)
from teacher_cache.format.shards import create_array
from teacher_cache.format.small_arrays import encode_metadata, write_metadata
from teacher_cache.format.superseded import clear_arrays, forget_extension, is_empty, is_superseded
from teacher_cache.storage.local import Storage

_WRITES_AT_ONCE = 4
BlockValues = dict[str, NDArray[Any] | bytes]
"""The arrays of a block by path: numbers of the block's shape, or a shard that holds them already."""


class GroupWriter:
    """One group of a store, for writing. Blocks may be written in any order, each by one writer."""

    def __init__(self, storage: Storage, group: Group) -> None:
        self.storage = storage
        self.group = group
        self.manifest = group.manifest
        self._memory: dict[str, Any] = {}

    def committed(self) -> set[int]:
        """Blocks that are finished."""
        return whole_blocks(self.group, read_commits(self.storage, self.group), self.storage.list())

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        """The zarr arrays, in memory."""
        root = zarr.open_group(MemoryStore(self._memory), mode="w")
        return {path: create_array(root, spec, self.manifest.blocks) for path, spec in self.group.arrays.items()}

    def metadata(self) -> dict[str, bytes]:
        """What zarr needs to know of the arrays, by object key."""
        return encode_metadata(self._memory) if self._arrays else {}

    def write_metadata(self) -> None:
        """Write what zarr needs to know of the arrays, where it is not there yet. Before the first block."""
        write_metadata(self.storage, self.metadata())

    def write_block(self, block: int, values: Mapping[str, NDArray[Any] | bytes]) -> Commit:
        """Write every array of a block, then its commit. `values` are `BlockValues`.

        Raises:
            SpaceError: there is no room; nothing of the block counts, and a rerun goes on here.
            StoreError: the storage cannot be written.
        """
        if values.keys() != self.group.arrays.keys():
            raise ValueError(f"block {block} lacks or adds {sorted(values.keys() ^ self.group.arrays.keys())}")
        # many small objects: where each write waits for a disk or a network, several wait together
        with ThreadPoolExecutor(_WRITES_AT_ONCE, thread_name_prefix="shards") as pool:
            shards = dict(pool.map(self._write_shard, *zip(*self.encode_block(block, values), strict=True)))
        commit = Commit(block=block, rows=self.manifest.block_range(block), shards=shards)
        self.storage.write(self.group.prefix + commit_key(block), commit.to_bytes())
        return commit

    def _write_shard(self, key: str, data: bytes) -> tuple[str, ObjectDigest]:
        self.storage.write(key, data)
        return key, ObjectDigest.of(data)

    def encode_block(self, block: int, values: Mapping[str, NDArray[Any] | bytes]) -> Iterator[tuple[str, bytes]]:
        """The shards of a block by object key, one at a time."""
        for path, spec in self.group.arrays.items():
            value, key = values[path], shard_key(spec, block)
            if isinstance(value, bytes):
                yield key, value
                continue
            self._arrays[path][block] = value
            yield key, self._memory.pop(key).to_bytes()

    def write_manifest(self, manifest: Manifest) -> GroupWriter:
        """Replace the group's manifest; returns its writer from now on."""
        write_manifest(self.storage, self.group.prefix, manifest)
        return GroupWriter(self.storage, replace(self.group, manifest=manifest))

    def seal(self) -> Seal:
        """Declare the group finished: hash every commit and every object that is not a shard, and write the totals.

        Raises:
            StoreError: a block or a constant is missing.
        """
        commits, sizes = read_commits(self.storage, self.group), self.storage.list()
        missing = sorted(set(range(self.manifest.blocks)) - whole_blocks(self.group, commits, sizes))
        if missing:
            raise StoreError(
                f"{self.storage.location} lacks {len(missing)} of {self.manifest.blocks} blocks (first: {missing[0]}): "
                f"an unfinished store must not pass for whole; {self.group.how_to_finish}"
            )
        totals = dict.fromkeys(self.group.arrays, 0)
        for commit in commits.values():
            for key, digest in commit.shards.items():
                totals[key.partition("/c/")[0]] += digest.size
        listed = list_commit_hashes([ObjectDigest.of(commits[block].to_bytes()).sha256 for block in sorted(commits)])
        objects = self._digest_objects(sizes) | {self.group.prefix + COMMIT_HASHES: ObjectDigest.of(listed)}
        seal = Seal(
            rows=self.manifest.rows,
            blocks=self.manifest.blocks,
            bytes_per_array=totals,
            objects=dict(sorted(objects.items())),
            format_version=self.manifest.format_version,
        )
        self.storage.write(self.group.prefix + COMMIT_HASHES, listed)
        self.storage.write(self.group.prefix + SEAL, seal.to_bytes())
        return seal

    def _digest_objects(self, sizes: Mapping[str, int]) -> dict[str, ObjectDigest]:
        """Every object of the group but shards, commits, their list and the seal: metadata, constants, teacher."""
        keys = {self.group.prefix + METADATA}
        constants = constant_paths(self.manifest)
        for path in (*self.group.arrays, *constants):
            parts = path.split("/")
            keys |= {"/".join([*parts[:depth], METADATA]) for depth in range(1, len(parts) + 1)}
        for path in constants:
            keys |= {key for key in sizes if key.startswith(f"{path}/")}
            if not any(key.startswith(f"{path}/c") for key in sizes):
                raise StoreError(f"{self.storage.location!r} lacks {path!r}: {self.group.how_to_finish}")
        files = {}
        if not self.group.prefix:
            keys.add(TEACHER_FILES)
            # as they were written: what has become of them since is found when they are read
            files = read_teacher_files(self.storage)
        try:
            digests = {key: digest_object(self.storage, key) for key in keys} | files
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.storage.location!r} has lost an object that was written before ({error}): it cannot be sealed; "
                f"run `kdcache verify --evict {self.storage.location}` and this command again"
            ) from error
        return digests

    def unseal(self) -> GroupWriter:
        """Declare the group unfinished, to write a block again; returns its writer from now on."""
        self.storage.delete(self.group.prefix + SEAL)
        return GroupWriter(self.storage, replace(self.group, seal=None))


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
    if len(groups) == 1 and first.seal is None:
        if is_empty(storage, first) and first.manifest.differences(manifest):
            clear_arrays(storage, first.manifest, [])
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
    if prefix:
        # what one that was given up has left
        clear_arrays(storage, manifest, others)
    # the manifest comes first, in one piece: a place that has it is ours to continue, any other is not
    write_manifest(storage, prefix, manifest)
    return GroupWriter(storage, Group(prefix=prefix, manifest=manifest, seal=None))


def _refuse_differences(storage: Storage, groups: Iterable[Group], wanted: Manifest, *, state: str) -> None:
    have = merge_manifests([group.manifest for group in groups])
    differences = have.differences(wanted)
    lines = "".join(
        f"\n  {name}: the store has {_said(mine)}, this command asks for {_said(theirs)}"
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


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)
