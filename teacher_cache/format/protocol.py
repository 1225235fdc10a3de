"""The objects of a store beside its arrays: how manifests, commits and seals are named, hashed and read.

What a reader and a writer must agree on lives here, so that neither imports the other. Each of these objects is JSON
that carries the hash of its own contents, so that a changed byte of it is found even where nothing else vouches for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.contract.manifest import FORMAT_NAME, Manifest, sha256_of_json
from teacher_cache.errors import StoreError
from teacher_cache.fields import check_fields
from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.schema import CommitSchema, SealSchema, TeacherFilesSchema, check_manifest
from teacher_cache.outside import MOST_BYTES, parse_json, visible_strings
from teacher_cache.storage.base import Storage
from teacher_cache.storage.keys import is_safe_key

METADATA = "zarr.json"
COMMITS = "commits"
COMMIT_HASHES = "commits.sha256"
"""SHA-256 of every commit of a finished group, as `sha256sum` writes and checks them. The seal holds the digest of this
list: it grows with the store, and opening one is to take the same time for any."""
SEAL = "seal.json"
EXTENSIONS = "extensions"
TEACHER = "teacher"
TEACHER_FILES = "teacher.json"
"""Lists the files below `teacher/` with their digests; written after them."""
_CHECKSUM = "sha256"
_NOT_ITS_CHECKSUM = "it does not match its own checksum"
_HASH_DIGITS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")


NOT_AN_OBJECT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an object raises that is not what it should be, however deeply its brackets are nested."""


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and content hash of one object of the store."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f"the size of an object is {self.size!r}, which is no number of bytes")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.sha256!r} is no SHA-256 in 64 hexadecimal digits")

    @classmethod
    def of(cls, data: bytes) -> ObjectDigest:
        """The digest of these bytes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_object(storage: Storage, key: str) -> ObjectDigest:
    """The digest of an object, read in pieces; FileNotFoundError if there is none."""
    hasher, size = hashlib.sha256(), 0
    for piece in storage.stream(key):
        hasher.update(piece)
        size += len(piece)
    return ObjectDigest(size=size, sha256=hasher.hexdigest())


def read_small(storage: Storage, key: str) -> bytes:
    """An object that is small whatever the store holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is so large that it is something else, and was not read.
    """
    return storage.read(key, MOST_BYTES)


def damage(storage: Storage, key: str, expected: ObjectDigest) -> str | None:
    """What is wrong with an object, such as `is missing`; None if it is what was written."""
    if (what := wrong_size(storage, key, expected)) is not None:
        return what
    return None if digest_object(storage, key) == expected else "has other contents than were written"


def wrong_size(storage: Storage, key: str, expected: ObjectDigest) -> str | None:
    """`damage` as far as a look at its size shows it; nothing is read."""
    size = storage.size(key)
    if size is None:
        return "is missing"
    return None if size == expected.size else f"has {size} bytes instead of {expected.size}"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One finished block: its rows and the digest of each of its shards by object key."""

    block: int
    rows: tuple[int, int]
    shards: Mapping[str, ObjectDigest]

    def to_bytes(self) -> bytes:
        """The commit object."""
        return write_checked(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        """Read a commit object; one of NOT_AN_OBJECT if it is not what was written."""
        fields = read_checked(data)
        check_fields(CommitSchema, fields)
        shards = _read_digests(fields["shards"])
        return cls(block=int(fields["block"]), rows=(fields["rows"][0], fields["rows"][1]), shards=shards)


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Says that a group is finished: totals, and digests of its objects but shards and commits."""

    rows: int
    blocks: int
    bytes_per_array: Mapping[str, int]
    objects: Mapping[str, ObjectDigest]
    format_version: int

    def to_bytes(self) -> bytes:
        """The seal object."""
        return write_checked({"format": FORMAT_NAME, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Seal:
        """Read a seal object; one of NOT_AN_OBJECT if it is not what was written."""
        fields = read_checked(data)
        check_fields(SealSchema, fields)
        fields.pop("format")
        fields["objects"] = _read_digests(fields["objects"])
        return cls(**fields)


def commit_key(block: int) -> str:
    """The object key of a block's commit within its group."""
    return f"{COMMITS}/{block:08d}.json"


def shard_key(spec: ArraySpec, block: int) -> str:
    """The object key of an array's shard for one block."""
    return "/".join([spec.path, "c", str(block), *("0" for _ in spec.block_shape)])


def array_of(key: str) -> str:
    """The path of the array whose shard lies under a key."""
    return key.partition("/c/")[0]


def list_commit_hashes(hashes: Sequence[str]) -> bytes:
    """The list of a group's commits by the hash of each."""
    return "".join(f"{digest}  {commit_key(block)}\n" for block, digest in enumerate(hashes)).encode()


def list_commits(commits: Mapping[int, Commit]) -> bytes:
    """The list of a group's commits, given by block."""
    return list_commit_hashes([ObjectDigest.of(commits[block].to_bytes()).sha256 for block in sorted(commits)])


def commit_hashes_size(blocks: int) -> int:
    """How many bytes the list of so many commits has; nothing grows with their number to know it."""
    line = len(list_commit_hashes(["0" * _HASH_DIGITS]))
    # numbers are written in eight digits, and in more where they need more
    longer: int = sum(max(0, blocks - 10**digits) for digits in range(8, len(str(blocks))))
    return blocks * line + longer


def read_commit_hashes(data: bytes) -> list[str]:
    """The hashes of commits by block.

    Raises:
        ValueError: it is no list of them, although it may be what was sealed.
    """
    hashes = [line[:_HASH_DIGITS] for line in data.decode().splitlines()]
    if list_commit_hashes(hashes) != data:
        raise ValueError("it is no list of the hashes of commits")
    return hashes


def write_checked(fields: Mapping[str, Any]) -> bytes:
    """JSON of these fields and the hash of them."""
    return (json.dumps({**fields, _CHECKSUM: sha256_of_json(fields)}, indent=1) + "\n").encode()


def read_checked(data: bytes) -> dict[str, Any]:
    """The fields that `write_checked` wrote, byte for byte; one of NOT_AN_OBJECT if it did not."""
    fields: dict[str, Any] = parse_json(data)
    fields.pop(_CHECKSUM)
    if write_checked(fields) != data:
        raise ValueError(_NOT_ITS_CHECKSUM)
    return fields


def write_manifest(storage: Storage, prefix: str, manifest: Manifest) -> None:
    """Write the manifest of a group, in one piece, into the attributes of its zarr group.

    Raises:
        StoreError: no reader would take it.
    """
    attributes = manifest.to_json()
    try:
        check_manifest(json.loads(json.dumps(attributes)))
    except ValueError as error:
        raise StoreError(
            f"{storage.location!r} cannot be begun: {error}. A store that says so would be refused by everybody who "
            "reads it; change the flag that this comes from"
        ) from error
    storage.write(prefix + METADATA, _group_metadata({**attributes, _CHECKSUM: sha256_of_json(attributes)}))


def parse_manifest(data: bytes) -> Manifest:
    """Read what `write_manifest` wrote; one of NOT_AN_OBJECT if it is damaged.

    Raises:
        StoreError: it is no manifest, or one of another format version.
    """
    attributes = parse_json(data)["attributes"]
    fields = {key: value for key, value in attributes.items() if key != _CHECKSUM}
    Manifest.check_version(fields)
    check_manifest(fields)
    # the whole object, not only what of it makes the manifest
    if attributes[_CHECKSUM] != sha256_of_json(fields) or _group_metadata(attributes) != data:
        raise ValueError(_NOT_ITS_CHECKSUM)
    return Manifest.from_json(visible_strings(fields))


def _group_metadata(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def write_teacher_files(storage: Storage, files: Mapping[str, ObjectDigest]) -> None:
    """List the files of the teacher, once all of them are there."""
    storage.write(TEACHER_FILES, write_checked({"files": {key: asdict(digest) for key, digest in files.items()}}))


def read_teacher_files(storage: Storage) -> dict[str, ObjectDigest]:
    """The files of the teacher by key; FileNotFoundError or one of NOT_AN_OBJECT if there is no list of them."""
    fields = read_checked(read_small(storage, TEACHER_FILES))
    check_fields(TeacherFilesSchema, fields)
    return _read_digests(fields["files"])


def _read_digests(listed: Mapping[str, Any]) -> dict[str, ObjectDigest]:
    """Objects by key, each key inside the store; ValueError or TypeError if something else stands there."""
    for key in listed:
        if not is_safe_key(key):
            raise ValueError(f"it lists {key!r}, which does not lie inside the store")
    return {key: ObjectDigest(**digest) for key, digest in listed.items()}


def has_teacher(storage: Storage) -> bool:
    """Whether every file of the teacher is there, in its size."""
    try:
        files = read_teacher_files(storage)
    except (FileNotFoundError, *NOT_AN_OBJECT):
        return False
    return all(storage.size(key) == digest.size for key, digest in files.items())


def read_manifest(storage: Storage, prefix: str = "") -> Manifest:
    """The manifest of a group of a store, by default the first one's.

    Raises:
        StoreError: there is no store of this format and version.
    """
    key = prefix + METADATA
    try:
        return parse_manifest(read_small(storage, key))
    except FileNotFoundError as error:
        if not storage.list():
            raise StoreError(
                f"no store at {storage.location!r}: there is nothing to read; build one with `kdcache build --out "
                f"{storage.location}`"
            ) from error
        raise _no_manifest(storage, key, error) from error
    except StoreError as error:
        raise StoreError(f"{storage.location!r}: {error}") from error
    except (OSError, *NOT_AN_OBJECT) as error:
        raise _no_manifest(storage, key, error) from error


def _no_manifest(storage: Storage, key: str, error: Exception) -> StoreError:
    prefix = key.removesuffix(METADATA)
    if storage.size(prefix + SEAL) is not None or storage.list(f"{prefix}{COMMITS}/"):
        return StoreError(
            f"{storage.location!r} is damaged: {key!r} cannot be read ({type(error).__name__}: {error}), so nothing "
            "says what its numbers are; restore that file from a copy, or delete the store's folder and build again"
        )
    return StoreError(
        f"{storage.location!r} is not a store ({type(error).__name__} at its {key}): it holds something else, "
        "which must not be read as targets or overwritten; give another path"
    )
