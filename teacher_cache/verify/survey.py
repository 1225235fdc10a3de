"""One group of a store as it lies there: its seal, manifest and commits are read, what they vouch for is collected.

Out: findings (objects that are not what they should be), expectations (objects to be hashed, with the digests that they
should have) and the keys that belong to the group. A damaged object does not end the survey: without its manifest a
group is known by its seal, without its seal by its manifest. Cost: one small read per block, by a few threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from teacher_cache.contract.manifest import Manifest
from teacher_cache.errors import StoreError
from teacher_cache.format.given_up import number_of, read_given_up
from teacher_cache.format.groups import (
    Group,
    committed_blocks,
    counts_alike,
    has_lost_seal,
    is_shard,
    mismatch,
    name_group,
    read_commits,
)
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    METADATA,
    NOT_AN_OBJECT,
    SEAL,
    TEACHER,
    TEACHER_FILES,
    Commit,
    ObjectDigest,
    Seal,
    array_of,
    commit_key,
    list_commits,
    parse_manifest,
    read_commit_hashes,
    read_small,
    read_teacher_files,
)
from teacher_cache.format.vouched import FOREIGN, UNLISTED, foreign, unlisted
from teacher_cache.storage.base import Storage
from teacher_cache.threads import in_threads
from teacher_cache.verify.contents import impossible_contents
from teacher_cache.verify.unfinished import check_unsealed

ObjectKind = Literal["manifest", "seal", "commit", "shard", "metadata", "constant", "teacher"]
"""What an object is: `metadata` is the zarr.json of an array or of a group of arrays."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One object that is not what it should be. `array` and `block` say what it belongs to, if to one."""

    key: str
    part: ObjectKind
    group: str
    array: str | None = None
    block: int | None = None
    what: str

    def __str__(self) -> str:
        where = f" (block {self.block} of {self.array})" if self.part == "shard" else ""
        return f"{self.key}{where} {self.what}"


@dataclass(frozen=True, kw_only=True)
class GroupCheck:
    """What is known of a group of targets. `missing_blocks` of a finished one are damage and named in findings too."""

    prefix: str
    name: str
    sealed: bool
    blocks: int
    missing_blocks: tuple[int, ...]
    seal_lost: bool
    """It is unfinished for want of a seal alone: one was there, or whatever made it was killed just before."""
    group: Group | None = field(repr=False)

    @property
    def manifest(self) -> Manifest | None:
        """What the group holds, if that can be read."""
        return None if self.group is None else self.group.manifest


@dataclass(frozen=True)
class Expected:
    """An object that a commit, a seal or a list vouches for."""

    key: str
    digest: ObjectDigest
    part: ObjectKind
    group: str
    array: str | None = None
    block: int | None = None


class Survey:
    """One group: its own objects are read, and everything else that it vouches for is collected to be hashed."""

    def __init__(self, storage: Storage, sizes: Mapping[str, int], prefix: str) -> None:
        self.storage = storage
        self.sizes = sizes
        self.prefix = prefix
        self.name = name_group(prefix)
        self.findings: list[Finding] = []
        self.expected: list[Expected] = []
        self.accounted = {prefix + METADATA, prefix + SEAL, prefix + COMMIT_HASHES}
        self.missing: list[int] = []
        self.seal: Seal | None = None
        self.group: Group | None = None
        self.blocks = 0
        self.seal_lost = False

    def result(self) -> GroupCheck:
        """What is known of the group."""
        return GroupCheck(
            prefix=self.prefix,
            name=self.name,
            sealed=self.seal is not None,
            blocks=self.blocks,
            missing_blocks=tuple(self.missing),
            seal_lost=self.seal_lost,
            group=self.group,
        )

    def run(self) -> None:
        """Read seal, manifest and commits."""
        self.seal = self._read_seal()
        manifest = self._read_manifest()
        if self.seal is not None and manifest is not None and not counts_alike(self.seal, self.prefix, manifest):
            self._find(self.prefix + SEAL, "seal", "counts other rows or blocks than the manifest")
            self.seal = None
        if manifest is not None:
            self.group = self._group(manifest)
            self.blocks = manifest.blocks
        if self.seal is not None:
            self.blocks = self.seal.blocks
        commits = self._read_commits()
        for block, commit in commits.items():
            for key, digest in self._held(commit).items():
                self.expected.append(Expected(key, digest, "shard", self.name, array_of(key), block))
        if self.group is not None:
            self.accounted |= {key for key in self.sizes if is_shard(key, self.group.arrays, self.blocks)}
        if self.seal is not None:
            self._check_sealed(self.seal, commits)

    def _group(self, manifest: Manifest) -> Group | None:
        """The group, without what it has given up; None where that cannot be told."""
        try:
            given_up = read_given_up(self.storage, self.prefix, self.seal)
        except StoreError as error:
            for key in self.sizes if self.seal is None else self.seal.objects:
                if number_of(key, self.prefix):
                    self._find(key, "manifest", cannot_be_read(error.__cause__ or error))
            return None
        if given_up.key is not None:
            self.accounted.add(given_up.key)
        return Group.of(self.prefix, manifest, self.seal, given_up)

    def _held(self, commit: Commit) -> dict[str, ObjectDigest]:
        """The shards of a commit that the group still has."""
        if self.group is None:
            left = None if self.seal is None else self.seal.bytes_per_array
            return {key: digest for key, digest in commit.shards.items() if left is None or array_of(key) in left}
        return {key: digest for key, digest in commit.shards.items() if not self.group.has_given_up(key)}

    def _check_sealed(self, seal: Seal, commits: Mapping[int, Commit]) -> None:
        self.expected += [Expected(key, digest, self._part_of(key), self.name) for key, digest in seal.objects.items()]
        self._check_totals(seal, commits)
        if self.group is None:
            return
        for key in unlisted(self.group):
            self.accounted.add(key)
            self._find(key, self._part_of(key), UNLISTED)
        for key in foreign(self.group):
            self._find(key, self._part_of(key), FOREIGN)
        for key, what in impossible_contents(self.storage, self.group, seal):
            self._find(key, self._part_of(key), what)

    def run_unsealed(self, vouched: set[str]) -> None:
        """Compare what no seal vouches for with what the manifest implies."""
        if self.seal is not None or self.group is None:
            return
        if not self.prefix:
            self._expect_teacher()
        # one that is there and cannot be read is a finding already; or a build has ended since
        self.seal_lost = has_lost_seal(self.storage, self.group) and self.storage.size(self.prefix + SEAL) is None
        if self.seal_lost and not self.findings:
            self._compare_list()
        found, known = check_unsealed(self.storage, self.group, self.sizes, vouched)
        self.accounted |= known
        for key, what in found.items():
            self._find(key, self._part_of(key), what)

    def _compare_list(self) -> None:
        assert self.group is not None
        key = self.prefix + COMMIT_HASHES
        try:
            if self.storage.read(key) != list_commits(read_commits(self.storage, self.group)):
                self._find(key, "seal", "lists other commits than there are, and the seal that could tell is missing")
        except OSError as error:
            self._find(key, "seal", cannot_be_read(error))

    def _find(self, key: str, part: ObjectKind, what: str, block: int | None = None) -> None:
        self.findings.append(Finding(key=key, part=part, group=self.name, block=block, what=what))

    def _read_seal(self) -> Seal | None:
        key = self.prefix + SEAL
        try:
            return Seal.from_bytes(read_small(self.storage, key))
        except FileNotFoundError:
            return None
        except (OSError, *NOT_AN_OBJECT) as error:
            self._find(key, "seal", cannot_be_read(error))
            return None

    def _read_manifest(self) -> Manifest | None:
        key = self.prefix + METADATA
        try:
            return parse_manifest(read_small(self.storage, key))
        except FileNotFoundError:
            self._find(key, "manifest", "is missing")
        except (OSError, *NOT_AN_OBJECT) as error:
            self._find(key, "manifest", cannot_be_read(error))
        except StoreError as error:
            if self.seal is None and not self.prefix:
                raise StoreError(f"{self.storage.location!r}: {error}") from error
            # the seal, or the first build, is of this format and version
            self._find(key, "manifest", cannot_be_read(error))
        return None

    def _read_commits(self) -> dict[int, Commit]:
        """The commits that are what they should be, by block; the others are findings."""
        there = committed_blocks(self.sizes, self.prefix, self.blocks)
        if self.seal is not None and len(there) < self.blocks:
            # a build may have ended since the objects were listed
            self.sizes = self.storage.list()
            there = committed_blocks(self.sizes, self.prefix, self.blocks)
        self.accounted |= {self.prefix + commit_key(block) for block in there}
        self.missing = sorted(set(range(self.blocks)).difference(there))
        if self.seal is not None:
            for block in self.missing:
                self._find(self.prefix + commit_key(block), "commit", "is missing", block)
        sealed = self._sealed_hashes()
        commits = {}
        for block, commit in zip(there, in_threads(partial(self._read_commit, sealed), there), strict=True):
            if isinstance(commit, Commit):
                commits[block] = commit
            else:
                self._find(self.prefix + commit_key(block), "commit", commit, block)
        return commits

    def _sealed_hashes(self) -> list[str] | None:
        """The hashes of the commits that were sealed; None if nothing trustworthy says them."""
        key = self.prefix + COMMIT_HASHES
        digest = None if self.seal is None else self.seal.objects.get(key)
        try:
            data = None if digest is None else self.storage.read(key, digest.size)
        except (OSError, ValueError):
            return None  # the list is a finding of its own
        if data is None or ObjectDigest.of(data) != digest:
            return None
        try:
            hashes = read_commit_hashes(data)
            if len(hashes) == self.blocks:
                return hashes
            raise ValueError(f"it lists {len(hashes)} commits of {self.blocks}")
        except ValueError as error:
            self._find(key, "seal", f"was sealed, but {error}")
            return None

    def _read_commit(self, sealed: list[str] | None, block: int) -> Commit | str:
        """A commit, or what is wrong with it."""
        try:
            data = read_small(self.storage, self.prefix + commit_key(block))
            commit = Commit.from_bytes(data)
        except FileNotFoundError:
            return "is missing"
        except (OSError, *NOT_AN_OBJECT) as error:
            return cannot_be_read(error)
        if sealed is not None and ObjectDigest.of(data).sha256 != sealed[block]:
            return "is not the one that was sealed"
        what = None if self.group is None else mismatch(self.group, block, commit)
        return commit if what is None else what

    def _check_totals(self, seal: Seal, commits: Mapping[int, Commit]) -> None:
        """Compare a seal with the commits beside it."""
        if len(commits) == self.blocks:
            totals = dict.fromkeys(seal.bytes_per_array, 0)
            for commit in commits.values():
                for key, digest in self._held(commit).items():
                    array = array_of(key)
                    totals[array] = totals.get(array, 0) + digest.size
            if totals != dict(seal.bytes_per_array):
                self._find(self.prefix + SEAL, "seal", "counts other bytes than the commits")

    def _expect_teacher(self) -> None:
        # they come before their list, and count once that is there
        self.accounted |= {key for key in self.sizes if key.startswith(f"{TEACHER}/")} | {TEACHER_FILES}
        if TEACHER_FILES not in self.sizes:
            return
        try:
            files = read_teacher_files(self.storage)
        except (OSError, *NOT_AN_OBJECT) as error:
            self._find(TEACHER_FILES, "teacher", cannot_be_read(error))
        else:
            self.expected += [Expected(key, digest, "teacher", self.name) for key, digest in files.items()]

    def _part_of(self, key: str) -> ObjectKind:
        """What an object is that is neither commit nor shard nor the seal itself."""
        if key == self.prefix + COMMIT_HASHES:
            return "seal"
        if key == self.prefix + METADATA:
            return "manifest"
        if key == TEACHER_FILES or key.startswith(f"{TEACHER}/"):
            return "teacher"
        constants = () if self.group is None else self.group.layout.constants
        return "constant" if any(key.startswith(f"{path}/") for path in constants) else "metadata"


def cannot_be_read(error: BaseException) -> str:
    """What a finding says of an object that gives an error."""
    return f"cannot be read ({type(error).__name__}: {error})"
