"""The store on disk: blocks that exist only once committed, and a seal that says the store is whole.

Writing order is the whole protocol. A block's shards are written first (each under a temporary name, then renamed, then
flushed to the disk), its commit object last; the commit holds the size and SHA-256 of every shard. A block without a
commit does not exist, so a build can be killed at any moment and started again. The seal is written after all blocks:
it holds the hash of every commit and of every other object, and readers refuse a store without it. This matters because
zarr itself reads what is missing as zeros: a deleted or swapped shard would otherwise be wrong numbers, not an error.

Layout of arrays: `layout.py`. Cost: one hash over the bytes written, one small object per block.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from teacher_cache.contract import FORMAT_NAME, Manifest
from teacher_cache.errors import StoreError
from teacher_cache.layout import ArraySpec, block_arrays
from teacher_cache.objects import (
    COMMITS,
    PARTIAL,
    SEAL,
    Commit,
    ObjectDigest,
    clear_errors,
    commit_key,
    digest_file,
    flush_to_disk,
    has_size,
    read_commit,
    read_manifest,
    refuse_remote,
    shard_key,
    write_whole,
)

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigLike

_EVERY_CHUNK: ArrayConfigLike = {"write_empty_chunks": True}


class CacheStore:
    """One store in a local folder, for writing. Blocks may be written in any order, each by one writer."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create_or_resume(cls, path: Path, manifest: Manifest) -> CacheStore:
        """Start a store, or go on with an unfinished one of exactly the same settings.

        Raises:
            StoreError: the path holds something else, or a store with other settings (each one named).
            SpaceError: the disk is full.
        """
        refuse_remote(path)
        if _exists(path) and (not path.is_dir() or any(file.suffix != PARTIAL for file in path.iterdir())):
            existing = read_manifest(path)
            differences = existing.differences(manifest)
            if differences:
                raise _other_settings(path, differences, sealed=(path / SEAL).exists())
            store = cls(path, existing)
            with clear_errors(path):
                store._remove_partial_files()
                if store.sealed and len(store.committed()) < existing.blocks:
                    (path / SEAL).unlink()  # a block was lost since: it is written again, and the store sealed again
        else:
            store = cls(path, manifest)
            with clear_errors(path):
                # the manifest comes first, in one rename: a folder that has it is ours to continue, any other is not
                zarr.create_group(str(path), attributes=manifest.to_json())
        return store

    @property
    def sealed(self) -> bool:
        """Whether the store is finished."""
        return (self.path / SEAL).exists()

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays that are written block by block, by path."""
        return {spec.path: spec for spec in block_arrays(self.manifest)}

    @cached_property
    def _opened(self) -> dict[str, zarr.Array[Any]]:
        """The zarr arrays, created where they do not exist yet."""
        with clear_errors(self.path):
            root = zarr.open_group(str(self.path), mode="r+")
            return {path: self._open_array(root, spec) for path, spec in self.arrays.items()}

    def _open_array(self, root: zarr.Group, spec: ArraySpec) -> zarr.Array[Any]:
        if (self.path / spec.path / "zarr.json").exists():
            # how empty chunks are written is not part of an array's metadata: without this, a resumed build would
            # leave out chunks of zeros that an uninterrupted one writes
            return cast("zarr.Array[Any]", root[spec.path]).with_config(_EVERY_CHUNK)
        return root.create_array(
            spec.path,
            shape=(self.manifest.blocks, *spec.block_shape),
            shards=(1, *spec.block_shape),
            chunks=(1, *spec.chunk_shape),
            dtype=spec.dtype,
            fill_value=0,
            serializer=BytesCodec(endian="little"),
            # zstd's own checksum as well: some readers skip the outer one on partial reads
            compressors=[ZstdCodec(level=1, checksum=True), Crc32cCodec()],
            config=_EVERY_CHUNK,
        )

    def committed(self) -> set[int]:
        """Blocks that are finished: their commit can be read, and every shard has the size that it says.

        Contents are compared when they are read; here a look at sizes finds what was deleted or cut short.
        """
        folder = self.path / COMMITS
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        return {commit.block for commit in map(read_commit, files) if commit is not None and self._is_whole(commit)}

    def _is_whole(self, commit: Commit) -> bool:
        expected = {shard_key(spec, commit.block) for spec in self.arrays.values()}
        return commit.shards.keys() == expected and all(
            has_size(self.path / key, digest.size) for key, digest in commit.shards.items()
        )

    def write_block(self, block: int, values: Mapping[str, NDArray[np.generic]]) -> Commit:
        """Write every array of a block, then its commit. `values` has one array per path, of the block's shape.

        Raises:
            SpaceError: the disk is full; nothing of the block counts, and a rerun goes on here.
        """
        if values.keys() != self.arrays.keys():
            raise ValueError(f"block {block} lacks or adds {sorted(values.keys() ^ self.arrays.keys())}")
        with clear_errors(self.path):
            shards = {}
            for path, spec in self.arrays.items():
                file = self.path / shard_key(spec, block)
                # zarr reads the index of a shard that it overwrites, and fails where that is damaged
                file.unlink(missing_ok=True)
                self._opened[path][block] = values[path]
                flush_to_disk(file)
                flush_to_disk(file.parent)
                shards[shard_key(spec, block)] = digest_file(file)
            commit = Commit(block=block, rows=self.manifest.block_range(block), shards=shards)
            self.write_object(commit_key(block), commit.to_bytes())
        return commit

    def write_constant(self, path: str, value: NDArray[np.generic]) -> None:
        """Write a small array that is not cut into blocks, such as a projection, replacing one that is there."""
        with clear_errors(self.path):
            root = zarr.open_group(str(self.path), mode="r+")
            array = root.create_array(
                path,
                shape=value.shape,
                chunks=value.shape,
                dtype=value.dtype,
                compressors=[Crc32cCodec()],
                config=_EVERY_CHUNK,
                overwrite=True,
            )
            array[...] = value
            for file in (self.path / path).rglob("*"):
                flush_to_disk(file)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest in the root attributes, in one rename. This object keeps the old one: open it anew."""
        metadata = json.loads((self.path / "zarr.json").read_bytes())
        metadata["attributes"] = manifest.to_json()
        self.write_object("zarr.json", json.dumps(metadata, indent=2).encode())

    def has_constant(self, path: str) -> bool:
        """Whether `write_constant` has finished for this path."""
        files = (file for file in (self.path / path).rglob("*") if file.is_file())
        return any(file.name != "zarr.json" and file.suffix != PARTIAL for file in files)

    def write_object(self, key: str, data: bytes) -> None:
        """Write one object so that it is either whole on the disk or not there."""
        with clear_errors(self.path):
            write_whole(self.path / key, data)

    def has_folder(self, key: str) -> bool:
        """Whether `new_folder` has finished for this key."""
        return (self.path / key).is_dir()

    @contextmanager
    def new_folder(self, key: str) -> Iterator[Path]:
        """A folder to fill with files, which appears under `key` once it is whole.

        Raises:
            SpaceError: the disk is full.
        """
        scratch = self.path / f"{key}{PARTIAL}"
        with clear_errors(self.path):
            scratch.mkdir()
            yield scratch
            for file in scratch.rglob("*"):
                flush_to_disk(file)
            scratch.rename(self.path / key)
            flush_to_disk(self.path)

    def seal(self) -> dict[str, Any]:
        """Declare the store finished: hash every commit and every object that is not a shard, and write the totals.

        Raises:
            StoreError: a block is missing.
        """
        missing = sorted(set(range(self.manifest.blocks)) - self.committed())
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {self.manifest.blocks} blocks (first: {missing[0]}): an "
                "unfinished store must not pass for whole; run the same `kdcache build` again"
            )
        with clear_errors(self.path):
            for key in self._object_keys():
                flush_to_disk(self.path / key)
                flush_to_disk((self.path / key).parent)
        files = [self.path / commit_key(block) for block in range(self.manifest.blocks)]
        commits = [Commit.from_bytes(file.read_bytes()) for file in files]
        others = {key: asdict(digest_file(self.path / key)) for key in self._object_keys()}
        seal = {
            "format": FORMAT_NAME,
            "format_version": self.manifest.format_version,
            "rows": self.manifest.rows,
            "blocks": self.manifest.blocks,
            "bytes_per_array": _bytes_per_array(commits),
            "commits": [ObjectDigest.of(file.read_bytes()).sha256 for file in files],
            "objects": others,
        }
        self.write_object(SEAL, (json.dumps(seal, indent=1) + "\n").encode())
        return seal

    def _object_keys(self) -> Iterator[str]:
        """Every object that is neither shard nor commit nor seal: metadata, constants, teacher files."""
        shard_folders = {f"{path}/c" for path in self.arrays}
        ours = {"teacher", *(path.partition("/")[0] for path in self.arrays), "attention"}
        yield "zarr.json"
        for top in sorted(folder for folder in ours if (self.path / folder).is_dir()):
            for folder, folders, files in os.walk(self.path / top):
                inside = Path(folder).relative_to(self.path)
                folders[:] = sorted(name for name in folders if (inside / name).as_posix() not in shard_folders)
                # what a file manager leaves behind must not become part of the store
                yield from ((inside / name).as_posix() for name in sorted(files) if not name.startswith("."))

    def _remove_partial_files(self) -> None:
        """Delete what killed writers left under temporary names."""
        for path in list(self.path.rglob(f"*{PARTIAL}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _other_settings(path: Path, differences: list[tuple[str, Any, Any]], *, sealed: bool) -> StoreError:
    lines = "".join(
        f"\n  {name}: the store has {_said(have)}, this command asks for {_said(want)}"
        for name, have, want in differences
    )
    state = "a finished" if sealed else "an unfinished"
    return StoreError(
        f"{str(path)!r} is {state} store with other settings:{lines}\nMixing them would train on wrong targets; repeat "
        "the settings of the store, or choose another --out"
    )


def _exists(path: Path) -> bool:
    with clear_errors(path):
        return path.exists()


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _bytes_per_array(commits: list[Commit]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for commit in commits:
        for key, digest in commit.shards.items():
            path = key.partition("/c/")[0]
            totals[path] = totals.get(path, 0) + digest.size
    return totals
