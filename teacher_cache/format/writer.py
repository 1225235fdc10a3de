"""Writing a store: blocks that exist only once committed, and a seal for each group of targets that is whole.

Writing order is the whole protocol. A block's shards are written first, its commit object last; the commit holds the
size and SHA-256 of every shard. A block without a commit does not exist, so a build can be killed at any moment and
started again. After all blocks come a list of the hashes of all commits and the seal, which holds the hash of that list
and of every other object; readers refuse a group without it. This matters because zarr itself reads what is missing as
zeros: a deleted or swapped shard would otherwise be wrong numbers, not an error.

Shards are encoded in memory, several arrays of a block at a time, and whole objects go to the storage, which is why the
bytes of a block are the same wherever the store lies. Layout of arrays: `layout.py`. Cost: one hash over the bytes
written, one small object per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Semaphore
from types import TracebackType
from typing import Any, Self

import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from teacher_cache.contract.manifest import Manifest
from teacher_cache.errors import StoreError
from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.given_up import GIVEN_UP, number_of
from teacher_cache.format.groups import (
    Group,
    has_lost_seal,
    read_commits,
    whole_blocks,
)
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    SEAL,
    Commit,
    ObjectDigest,
    Seal,
    array_of,
    commit_key,
    digest_object,
    list_commits,
    read_teacher_files,
    shard_key,
    write_manifest,
)
from teacher_cache.format.shards import create_array, encode_shard
from teacher_cache.format.small_arrays import encode_metadata, write_metadata
from teacher_cache.format.vouched import keys_to_seal
from teacher_cache.storage.base import Storage

_WRITES_AT_ONCE = 4
BlockValues = dict[str, NDArray[Any] | bytes]
"""The arrays of a block by path: numbers of the block's shape, or a shard that holds them already."""


class ShardThreads:
    """The threads in which the arrays of blocks are encoded and written, one array each; as a context manager closed.

    So many of them encode at a time as there are `cores` for it. Others wait for a disk or a network meanwhile: there
    are many small objects, and several wait together.
    """

    def __init__(self, cores: int) -> None:
        self._pool = ThreadPoolExecutor(cores + _WRITES_AT_ONCE, thread_name_prefix="shards")
        self._cores = Semaphore(cores)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def write(
        self, storage: Storage, shards: Mapping[str, tuple[ArraySpec, NDArray[Any] | bytes]]
    ) -> dict[str, ObjectDigest]:
        """Write shards by object key, of numbers or of bytes; returns the digest of each."""
        return dict(self._pool.map(lambda key: (key, self._write(storage, key, *shards[key])), shards))

    def _write(self, storage: Storage, key: str, spec: ArraySpec, value: NDArray[Any] | bytes) -> ObjectDigest:
        with self._cores:
            data = value if isinstance(value, bytes) else encode_shard(spec, value)
            digest = ObjectDigest.of(data)
        storage.write(key, data)
        return digest


class GroupWriter:
    """One group of a store, for writing. Blocks may be written in any order, each by one writer."""

    def __init__(self, storage: Storage, group: Group) -> None:
        self.storage = storage
        self.group = group
        self.manifest = group.manifest

    def committed(self) -> set[int]:
        """Blocks that are finished."""
        return whole_blocks(self.group, read_commits(self.storage, self.group), self.storage.list())

    def metadata(self) -> dict[str, bytes]:
        """What zarr needs to know of the arrays, by object key: as zarr writes it of arrays that it makes itself."""
        objects: dict[str, Any] = {}
        root = zarr.open_group(MemoryStore(objects), mode="w")
        for spec in self.group.arrays.values():
            create_array(root, spec, self.manifest.blocks)
        return encode_metadata(objects)

    def write_metadata(self) -> None:
        """Write what zarr needs to know of the arrays, where it is not there yet. Before the first block."""
        write_metadata(self.storage, self.metadata())

    def write_block(
        self, block: int, values: Mapping[str, NDArray[Any] | bytes], threads: ShardThreads | None = None
    ) -> Commit:
        """Write every array of a block, then its commit. `values` are `BlockValues`.

        Raises:
            SpaceError: there is no room; nothing of the block counts, and a rerun goes on here.
            StoreError: the storage cannot be written.
        """
        if values.keys() != self.group.arrays.keys():
            raise ValueError(f"block {block} lacks or adds {sorted(values.keys() ^ self.group.arrays.keys())}")
        if threads is None:
            with ShardThreads(1) as own:
                return self.write_block(block, values, own)
        given = {shard_key(spec, block): (spec, values[path]) for path, spec in self.group.arrays.items()}
        shards = threads.write(self.storage, given)
        commit = Commit(block=block, rows=self.manifest.block_range(block), shards=shards)
        self.storage.write(self.group.prefix + commit_key(block), commit.to_bytes())
        return commit

    def encode_block(self, block: int, values: Mapping[str, NDArray[Any] | bytes]) -> Iterator[tuple[str, bytes]]:
        """The shards of a block by object key, one at a time."""
        for path, spec in self.group.arrays.items():
            value = values[path]
            yield shard_key(spec, block), value if isinstance(value, bytes) else encode_shard(spec, value)

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
                if self.group.has_given_up(key):
                    continue
                totals[array_of(key)] += digest.size
        listed = list_commits(commits)
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
        keys = keys_to_seal(self.group)
        for path in self.group.layout.constants:
            keys |= {key for key in sizes if key.startswith(f"{path}/")}
            if not any(key.startswith(f"{path}/c") for key in sizes):
                raise StoreError(f"{self.storage.location!r} lacks {path!r}: {self.group.how_to_finish}")
        files = {}
        if not self.group.prefix:
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

    def compare_lost_seal(self) -> str | None:
        """What to say before a group whose seal is missing is sealed anew; None where none is missing.

        Raises:
            StoreError: its commits are others than those that were sealed.
        """
        if not has_lost_seal(self.storage, self.group):
            return None
        key, commits = self.group.prefix + COMMIT_HASHES, read_commits(self.storage, self.group)
        if len(whole_blocks(self.group, commits, self.storage.list())) < self.manifest.blocks:
            # as in any unfinished group blocks are computed anew, and on another machine their commits are others
            self.storage.delete(key)
            return None
        if self.storage.read(key) != list_commits(commits):
            raise StoreError(
                f"{self.storage.location!r} is damaged: the commits of {self.group.name} are not those that {key!r} "
                "lists, and the seal that could tell which of them was changed is missing; restore both from a copy, "
                f"or run `kdcache verify --evict {self.storage.location}` and this command again"
            )
        return f"{self.group.name} lacks its seal alone; its commits are as they were listed, and it is sealed anew"

    def unseal(self) -> GroupWriter:
        """Declare the group unfinished, if it is not, to write a block again; returns its writer from now on."""
        if self.group.seal is None:
            return self
        # a command that was to give up targets may have ended before its seal: without a seal its word would count
        for key in self.storage.list(f"{self.group.prefix}{GIVEN_UP}/"):
            if number_of(key, self.group.prefix) and key != self.group.given_up.key:
                self.storage.delete(key)
        self.storage.delete(self.group.prefix + SEAL)
        # a list without a seal would say that a seal was lost
        self.storage.delete(self.group.prefix + COMMIT_HASHES)
        return GroupWriter(self.storage, replace(self.group, seal=None))
