"""What is in a store, finished or not: its manifest, the bytes of each array, which blocks are there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.contract import Manifest
from teacher_cache.layout import block_arrays, vector_streams
from teacher_cache.objects import SEAL, read_manifest, shard_key
from teacher_cache.store import CacheStore


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """A store at a glance. Bytes are on disk, of committed blocks; tokens are rows * seq_len of those blocks."""

    path: str
    manifest: Manifest
    sealed: bool
    committed_rows: int
    missing_blocks: tuple[int, ...]
    bytes_per_array: dict[str, int]
    other_bytes: int

    @property
    def committed_tokens(self) -> int:
        """Positions in committed rows, padding included."""
        return self.committed_rows * self.manifest.seq_len

    @property
    def total_bytes(self) -> int:
        """Everything in the store's folder."""
        return sum(self.bytes_per_array.values()) + self.other_bytes

    def bytes_per_token(self, array: str) -> float:
        """Bytes on disk per position of a committed row."""
        return self.bytes_per_array[array] / max(1, self.committed_tokens)

    def bits_per_value(self) -> dict[str, float]:
        """Bits on disk per component and position of a committed row, padding included, of each stream of vectors."""
        bits = {}
        for stream in vector_streams(self.manifest):
            size = sum(size for path, size in self.bytes_per_array.items() if path.startswith(f"{stream.path}/"))
            values = self.committed_tokens * self.manifest.views_of(stream.view) * stream.width
            bits[stream.path] = 8 * size / max(1, values)
        return bits

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            **asdict(self),
            "manifest": self.manifest.to_json(),
            "total_bytes": self.total_bytes,
            "bits_per_value": self.bits_per_value(),
            "bytes_per_token": {array: self.bytes_per_token(array) for array in self.bytes_per_array},
        }


def describe_store(path: str | Path) -> StoreInfo:
    """Look at a store without reading its targets.

    Raises:
        StoreError: there is no store of this format and version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    committed = CacheStore(folder, manifest).committed()
    ranges = [manifest.block_range(block) for block in committed]
    bytes_per_array = {
        spec.path: sum(_size(folder / shard_key(spec, block)) for block in committed) for spec in block_arrays(manifest)
    }
    every_file = sum(_size(file) for file in folder.rglob("*") if file.is_file())
    return StoreInfo(
        path=str(path),
        manifest=manifest,
        sealed=(folder / SEAL).exists(),
        committed_rows=sum(last - first for first, last in ranges),
        missing_blocks=tuple(sorted(set(range(manifest.blocks)) - committed)),
        bytes_per_array=bytes_per_array,
        other_bytes=every_file - sum(bytes_per_array.values()),
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
