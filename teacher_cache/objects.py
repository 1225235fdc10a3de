"""The objects of a store beside its arrays: manifest, commits, seal; how each is named, hashed and safely written.

What a reader and a writer must agree on lives here, so that neither imports the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from safetensors import SafetensorError

from teacher_cache.contract import Manifest, canonical_json
from teacher_cache.errors import NO_SPACE, SpaceError, StoreError, system_error_number
from teacher_cache.layout import ArraySpec

COMMITS = "commits"
SEAL = "seal.json"
PARTIAL = ".partial"
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT}
_REMOTE = re.compile(r"[a-z0-9]+:/")


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and content hash of one object of the store."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> ObjectDigest:
        """The digest of these bytes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> ObjectDigest:
    """The digest of a file, read in pieces."""
    with path.open("rb") as file:
        return ObjectDigest(
            size=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
        )


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
        """Read a commit object; ValueError, KeyError or TypeError if it is not one."""
        fields = json.loads(data)
        shards = {key: ObjectDigest(**digest) for key, digest in fields["shards"].items()}
        return cls(block=int(fields["block"]), rows=(fields["rows"][0], fields["rows"][1]), shards=shards)


def commit_key(block: int) -> str:
    """The object key of a block's commit."""
    return f"{COMMITS}/{block:08d}.json"


def shard_key(spec: ArraySpec, block: int) -> str:
    """The object key of an array's shard for one block."""
    return "/".join([spec.path, "c", str(block), *("0" for _ in spec.block_shape)])


def read_manifest(path: Path) -> Manifest:
    """The manifest in a store's root attributes.

    Raises:
        StoreError: there is no store of this format and version.
    """
    refuse_remote(path)
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        if not isinstance(attributes, dict):
            raise TypeError("no attributes")
    except FileNotFoundError as error:
        if not path.exists():
            raise StoreError(
                f"no store at {str(path)!r}: there is nothing to read; build one with `kdcache build --out {path}`"
            ) from error
        raise _not_a_store(path, error) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_a_store(path, error) from error
    try:
        return Manifest.from_json(attributes)
    except StoreError as error:
        raise StoreError(f"{str(path)!r}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{str(path)!r} has a damaged manifest ({error!r}): build the store again") from error


def refuse_remote(path: Path) -> None:
    """Refuse `s3://bucket/...`, which would otherwise become a folder named `s3:`.

    Raises:
        StoreError: the path names a remote store.
    """
    if _REMOTE.match(str(path)):
        raise StoreError(f"{str(path)!r} names a remote store: stores are local folders so far; give a local path")


def _not_a_store(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{str(path)!r} is not a store ({type(error).__name__} at its zarr.json): it holds something else, which must "
        "not be read as targets or overwritten; give another path"
    )


def read_constant(path: Path, name: str) -> NDArray[Any]:
    """A small array that is not cut into blocks, such as a projection."""
    return np.asarray(zarr.open_array(str(path / name), mode="r")[...])


def read_commit(file: Path) -> Commit | None:
    """A commit object, or None where the file is damaged."""
    try:
        return Commit.from_bytes(file.read_bytes())
    except (ValueError, KeyError, TypeError):
        return None


def write_whole(target: Path, data: bytes) -> None:
    """Write a file so that it is either whole on the disk or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=PARTIAL, delete=False) as file:
        written = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written.chmod(0o644)
            written.replace(target)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    flush_to_disk(target.parent)


def has_size(file: Path, size: int) -> bool:
    """Whether there is a file of this size."""
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Say what to do when the disk is full or may not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = system_error_number(error)
        if number in NO_SPACE:
            raise SpaceError(
                f"no space left while writing {str(path)!r} ({os.strerror(number)}): committed blocks are safe and "
                "whole; free some space and run the same command again, it continues there"
            ) from error
        if number in _NOT_WRITABLE:
            raise StoreError(
                f"cannot write {str(path)!r} ({os.strerror(number)}): the store needs a folder that may be written; "
                "choose another --out or mend its permissions"
            ) from error
        raise
