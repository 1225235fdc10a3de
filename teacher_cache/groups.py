"""The groups of a store: sets of targets that were built and sealed together, and what is committed of them.

The first group holds the rows and the targets of the first build. Targets that are added to a finished store make a
group of their own, an *extension*, with its own manifest, commits and seal below `extensions/<n>/`, so that adding them
touches nothing that is there. Arrays of all groups lie in one tree. A group without a seal is unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from teacher_cache.contract import Manifest
from teacher_cache.errors import StoreError
from teacher_cache.layout import ArraySpec, block_arrays
from teacher_cache.objects import (
    COMMITS,
    EXTENSIONS,
    METADATA,
    NOT_AN_OBJECT,
    SEAL,
    Commit,
    Seal,
    commit_key,
    damage,
    read_manifest,
    shard_key,
)
from teacher_cache.storage import Storage


@dataclass(frozen=True)
class Group:
    """A group as it is stored; `seal` is None while it is unfinished."""

    prefix: str
    manifest: Manifest
    seal: Seal | None

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays that are written block by block, by path."""
        return {spec.path: spec for spec in block_arrays(self.manifest)}

    @property
    def name(self) -> str:
        """What a message calls it."""
        return name_group(self.prefix)


def name_group(prefix: str) -> str:
    """What a message calls the group whose protocol objects lie below `prefix`."""
    return f"extension {prefix.split('/')[1]}" if prefix else "the first build"


def extension_prefix(number: int) -> str:
    """Where the protocol objects of extension `number`, from 1, lie."""
    return f"{EXTENSIONS}/{number}/"


def read_groups(storage: Storage) -> list[Group]:
    """Every group of a store, finished or not, in the order in which they were added.

    Raises:
        StoreError: there is no store of this format and version, or a seal is damaged.
    """
    groups = [_read_group(storage, "")]
    while _is_there(storage, prefix := extension_prefix(len(groups))):
        groups.append(_read_group(storage, prefix))
    return groups


def _is_there(storage: Storage, prefix: str) -> bool:
    # a seal without a manifest is a group that has lost it, not one that never was
    return any(storage.size(prefix + name) is not None for name in (METADATA, SEAL))


def _read_group(storage: Storage, prefix: str) -> Group:
    group = Group(prefix=prefix, manifest=read_manifest(storage, prefix), seal=read_seal(storage, prefix))
    if group.seal is not None and not counts_alike(group.seal, group.manifest):
        raise StoreError(
            f"{storage.location!r} is damaged: {prefix + SEAL!r} counts other rows or blocks than the manifest beside "
            "it: one is of another store; restore both from a copy, or delete the store's folder and build again"
        )
    return group


def counts_alike(seal: Seal, manifest: Manifest) -> bool:
    """Whether a seal is about as many rows and blocks as a manifest."""
    said = (seal.rows, seal.blocks, len(seal.commits), seal.format_version)
    return said == (manifest.rows, manifest.blocks, manifest.blocks, manifest.format_version)


def read_seal(storage: Storage, prefix: str) -> Seal | None:
    """The seal of a group, None where it is unfinished.

    Raises:
        StoreError: there is a seal, and it is damaged.
    """
    try:
        return Seal.from_bytes(storage.read(prefix + SEAL))
    except FileNotFoundError:
        return None
    except NOT_AN_OBJECT as error:
        raise StoreError(
            f"{storage.location!r} is damaged: {prefix + SEAL!r} cannot be read ({error!r}), so nothing in it can be "
            "trusted; restore that file from a copy, or delete it and run the same `kdcache build` again, which seals "
            "the store anew"
        ) from error


def read_commits(storage: Storage, group: Group) -> dict[int, Commit]:
    """Every commit of a group that can be read, by block."""
    commits = {}
    there = storage.list(f"{group.prefix}{COMMITS}/")
    for block in range(group.manifest.blocks):
        if (key := group.prefix + commit_key(block)) in there:
            with suppress(FileNotFoundError, *NOT_AN_OBJECT):
                commits[block] = Commit.from_bytes(storage.read(key))
    return commits


def mismatch(group: Group, block: int, commit: Commit) -> str | None:
    """What is wrong with a commit of a block, None if it says what the group's manifest implies."""
    if commit.block != block or commit.rows != group.manifest.block_range(block):
        return f"is about rows {commit.rows} of block {commit.block}"
    expected = {shard_key(spec, block) for spec in group.arrays.values()}
    lacking, foreign = sorted(expected - commit.shards.keys()), sorted(commit.shards.keys() - expected)
    if lacking or foreign:
        return f"lacks {lacking} and has {foreign}"
    return None


def damaged_objects(
    storage: Storage, group: Group, chosen: Callable[[str], bool] = lambda _key: True
) -> Iterator[tuple[str, str]]:
    """Keys of objects beside the blocks that are not what the group's seal says, and what is wrong with each."""
    for key, digest in (group.seal.objects if group.seal is not None else {}).items():
        if chosen(key) and (what := damage(storage, key, digest)) is not None:
            yield key, what


def whole_blocks(group: Group, commits: Mapping[int, Commit], sizes: Mapping[str, int]) -> set[int]:
    """Blocks that are finished: there is a commit, and every shard has the size that it says.

    `sizes` are those of all objects of the store. Contents are compared when they are read, or by `kdcache verify`; a
    look at sizes finds what was deleted or cut short.
    """
    whole = set()
    for block, commit in commits.items():
        sized = all(sizes.get(key) == digest.size for key, digest in commit.shards.items())
        if sized and mismatch(group, block, commit) is None:
            whole.add(block)
    return whole
