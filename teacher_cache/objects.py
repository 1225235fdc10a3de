"""The objects of a store beside its arrays: how manifests, commits and seals are named, hashed and read.

What a reader and a writer must agree on lives here, so that neither imports the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from teacher_cache.contract import FORMAT_NAME, Manifest, canonical_json
from teacher_cache.errors import StoreError
from teacher_cache.layout import ArraySpec
from teacher_cache.storage import Storage

METADATA = "zarr.json"
COMMITS = "commits"
SEAL = "seal.json"
EXTENSIONS = "extensions"
TEACHER = "teacher"
TEACHER_FILES = "teacher.json"
"""Lists the files below `teacher/` with their digests; written after them."""


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and content hash of one object of the store."""

    size: int
    sha256: str

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


def damage(storage: Storage, key: str, expected: ObjectDigest) -> str | None:
    """What is wrong with an object, such as `is missing`; None if it is what was written."""
    size = storage.size(key)
    if size is None:
        return "is missing"
    if size != expected.size:
        return f"has {size} bytes instead of {expected.size}"
    return None if digest_object(storage, key) == expected else "has other contents than were committed"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One finished block: its rows and the digest of each of its shards by object key."""

    block: int
    rows: tuple[int, int]
    shards: Mapping[str, ObjectDigest]

    def to_bytes(self) -> bytes:
        """The commit object."""
        return (canonical_json(asdict(self)) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        """Read a commit object; ValueError, KeyError, TypeError or AttributeError if it is not one."""
        fields = json.loads(data)
        shards = {key: ObjectDigest(**digest) for key, digest in fields["shards"].items()}
        return cls(block=int(fields["block"]), rows=(fields["rows"][0], fields["rows"][1]), shards=shards)


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Says that a group is finished: hashes of its commits in order, digests of its other objects, totals."""

    rows: int
    blocks: int
    bytes_per_array: Mapping[str, int]
    commits: tuple[str, ...]
    objects: Mapping[str, ObjectDigest]
    format_version: int

    def to_bytes(self) -> bytes:
        """The seal object."""
        return (json.dumps({"format": FORMAT_NAME, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Seal:
        """Read a seal object; ValueError, KeyError, TypeError or AttributeError if it is not one."""
        fields = json.loads(data)
        fields.pop("format")
        fields["commits"] = tuple(fields["commits"])
        fields["objects"] = {key: ObjectDigest(**digest) for key, digest in fields["objects"].items()}
        return cls(**fields)


NOT_AN_OBJECT = (ValueError, KeyError, TypeError, AttributeError)
"""What reading an object raises that is not what it should be."""


def commit_key(block: int) -> str:
    """The object key of a block's commit within its group."""
    return f"{COMMITS}/{block:08d}.json"


def shard_key(spec: ArraySpec, block: int) -> str:
    """The object key of an array's shard for one block."""
    return "/".join([spec.path, "c", str(block), *("0" for _ in spec.block_shape)])


def read_manifest(storage: Storage, prefix: str = "") -> Manifest:
    """The manifest of a group of a store, by default the first one's.

    Raises:
        StoreError: there is no store of this format and version.
    """
    try:
        attributes = json.loads(storage.read(prefix + METADATA))["attributes"]
        if not isinstance(attributes, dict):
            raise TypeError("no attributes")
    except FileNotFoundError as error:
        if not storage.list():
            raise StoreError(
                f"no store at {storage.location!r}: there is nothing to read; build one with `kdcache build --out "
                f"{storage.location}`"
            ) from error
        raise _not_a_store(storage, error) from error
    except (OSError, *NOT_AN_OBJECT) as error:
        raise _not_a_store(storage, error) from error
    try:
        return Manifest.from_json(attributes)
    except StoreError as error:
        raise StoreError(f"{storage.location!r}: {error}") from error
    except NOT_AN_OBJECT as error:
        raise StoreError(f"{storage.location!r} has a damaged manifest ({error!r}): build the store again") from error


def _not_a_store(storage: Storage, error: Exception) -> StoreError:
    return StoreError(
        f"{storage.location!r} is not a store ({type(error).__name__} at its {METADATA}): it holds something else, "
        "which must not be read as targets or overwritten; give another path"
    )
