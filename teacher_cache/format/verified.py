"""The bytes of a store's groups, each object compared with the hash that is known of it before it is handed out.

A seal holds the hashes of the list of commits and of every object beside the blocks, that list those of the commits, a
commit those of the shards of its block. An object that differs is refused as damaged; the message says which one it is
and what can be done. Thread-safe. Cost: one hash over what is read. The list of commits is read with the first shard
of a group, a commit with the first shard of its block; the last few commits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from teacher_cache.errors import DamagedStoreError, StoreError
from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.groups import Group, damaged_objects, mismatch
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    COMMITS,
    NOT_AN_OBJECT,
    TEACHER,
    TEACHER_FILES,
    Commit,
    ObjectDigest,
    Seal,
    commit_key,
    damage,
    read_commit_hashes,
    read_small,
    read_teacher_files,
    shard_key,
    wrong_size,
)
from teacher_cache.format.teacher_folder import check_teacher_folder, only_listed
from teacher_cache.format.vouched import FOREIGN, UNLISTED, foreign, unlisted
from teacher_cache.storage.base import Storage
from teacher_cache.storage.local_cache import LocalCache

_COMMITS_KEPT = 16


class VerifiedObjects:
    """Objects of these groups. With `copies`, shards, commits and their lists are kept and read there."""

    def __init__(self, storage: Storage, groups: Sequence[Group], copies: LocalCache | None = None) -> None:
        self.storage = storage
        self.arrays: dict[str, tuple[Group, ArraySpec]] = {}
        """Every array by path, and the group that it is read from."""
        self._groups = groups
        self._copies = copies
        # masks may be in several groups: those of the first finished one count
        for group in sorted(groups, key=lambda group: group.seal is None):
            for path, spec in group.arrays.items():
                self.arrays.setdefault(path, (group, spec))
        self._hashes: dict[str, list[str]] = {}
        self._listed: list[TemporaryDirectory[str]] = []
        self._commit = lru_cache(maxsize=_COMMITS_KEPT)(self._read_commit)

    def check_metadata(self) -> None:
        """Compare what every reader needs with the seals: what grows with the store is compared when it is read.

        Raises:
            DamagedStoreError: something differs, or a list of commits has another size.
        """
        self._check(lambda key: not key.startswith(f"{TEACHER}/") and not key.endswith(COMMIT_HASHES))
        for group in self._groups:
            for key in unlisted(group):
                raise self.damaged(key, UNLISTED)
            for key in foreign(group):
                raise self.damaged(key, FOREIGN)
            key = group.prefix + COMMIT_HASHES
            if group.seal is not None and (what := wrong_size(self.storage, key, group.seal.objects[key])) is not None:
                raise self.damaged(key, what)

    def teacher_folder(self) -> Path:
        """A Hugging Face folder with the teacher's configuration, weights and tokenizer, as it was written.

        Raises:
            StoreError: one of its files is missing or damaged.
        """
        try:
            files = read_teacher_files(self.storage)
        except (OSError, *NOT_AN_OBJECT) as error:
            raise self.damaged(TEACHER_FILES, f"cannot be read ({type(error).__name__}: {error})") from error
        for key, digest in files.items():
            if (what := damage(self.storage, key, digest)) is not None:
                raise self.damaged(key, what)
        self._check(lambda key: key == TEACHER_FILES)
        names = [key.removeprefix(f"{TEACHER}/") for key in files]
        folder = self.storage.folder(TEACHER)
        entries = self._groups[0].manifest.teacher.vocab_size
        check_teacher_folder(folder, names, entries, self.storage.location)
        if (listed := only_listed(folder, names)) is None:
            return folder
        self._listed.append(listed)
        return Path(listed.name)

    def shard(self, path: str, block: int) -> bytes:
        """The shard of one array and block as it was committed. Thread-safe.

        Raises:
            StoreError: it is missing or not what was committed.
        """
        group, spec = self.arrays[path]
        key = shard_key(spec, block)
        digest = self._commit(group.prefix, block).shards.get(key)
        if digest is None:
            raise self.damaged(key, "is not part of its block's commit")
        return self._read_object(key, digest)

    def _read_object(self, key: str, digest: ObjectDigest) -> bytes:
        """An object that has this digest, from the local copies if it is among them."""
        if self._copies is not None and (copy := self._copies.read(digest.sha256)) is not None:
            return copy
        try:
            data = self.storage.read(key, digest.size)
        except FileNotFoundError as error:
            raise self.damaged(key, "is missing") from error
        except ValueError as error:
            raise self.damaged(key, wrong_size(self.storage, key, digest) or "has another size") from error
        if len(data) != digest.size:
            raise self.damaged(key, f"has {len(data)} bytes instead of {digest.size}")
        if ObjectDigest.of(data) != digest:
            raise self.damaged(key, "has other contents than were committed")
        if self._copies is not None:
            self._copies.keep(digest.sha256, data)
        return data

    def _sealed_hashes(self, group: Group, seal: Seal) -> list[str]:
        """The hashes of a group's commits by block, as they were sealed."""
        key = group.prefix + COMMIT_HASHES
        if key not in self._hashes:
            try:
                self._hashes[key] = read_commit_hashes(self._read_object(key, seal.objects[key]))
            # of no block more than of any other: there is nothing to skip
            except DamagedStoreError as error:
                raise StoreError(str(error)) from error
            except ValueError as error:
                raise StoreError(str(self.damaged(key, f"was sealed, but {error}"))) from error
        return self._hashes[key]

    def _read_commit(self, prefix: str, block: int) -> Commit:
        key = prefix + commit_key(block)
        group = next(group for group in self._groups if group.prefix == prefix)
        sealed_as = None if group.seal is None else self._sealed_hashes(group, group.seal)[block]
        copy = None if self._copies is None or sealed_as is None else self._copies.read(sealed_as)
        try:
            data = read_small(self.storage, key) if copy is None else copy
            commit = Commit.from_bytes(data)
        except (OSError, *NOT_AN_OBJECT) as error:
            raise self.damaged(key, f"cannot be read ({type(error).__name__}: {error})") from error
        if copy is None and sealed_as is not None and ObjectDigest.of(data).sha256 != sealed_as:
            raise self.damaged(key, "was changed after the store was sealed")
        if (what := mismatch(group, block, commit)) is not None:
            raise self.damaged(key, what)
        if copy is None and self._copies is not None and sealed_as is not None:
            self._copies.keep(sealed_as, data)
        return commit

    def _check(self, chosen: Callable[[str], bool]) -> None:
        """Compare objects that are neither shards nor commits with the seals."""
        for group in self._groups:
            for key, what in damaged_objects(self.storage, group, chosen):
                raise self.damaged(key, what)

    def damaged(self, key: str, what: str) -> DamagedStoreError:
        """What to raise where an object is not what it should be."""
        path, _, place = key.partition("/c/")
        name, mend = repr(key), "or let `kdcache verify --evict` say what can be made again"
        if path in self.arrays or f"{COMMITS}/" in key:
            mend = (
                "or delete it and run the same `kdcache build` again, which computes the rows of this block anew "
                "(`kdcache verify --evict` finds and deletes everything that is damaged)"
            )
        if path in self.arrays:
            name += f" (block {place.partition('/')[0]} of {path})"
        return DamagedStoreError(
            f"{self.storage.location!r} is damaged: {name} {what}. Its numbers would be wrong targets, so nothing was "
            f"read; restore it from a copy, {mend}"
        )

    def impossible(self, path: str, block: int, what: str) -> DamagedStoreError:
        """What to raise where an array was committed with numbers that no build writes."""
        return DamagedStoreError(
            f"{self.storage.location!r} is damaged: {path!r} of block {block} {what}. It was written so, and would be "
            "read as wrong rows or targets, so nothing of the block was taken; get the store from whoever built it, or "
            "build it again"
        )
