"""What is in a store, finished or not: its manifest, the bytes of each array, which blocks are there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.contract.manifest import Manifest, merge_manifests
from teacher_cache.contract.targets import declared_errors, describe_targets
from teacher_cache.format.groups import Group, read_commits, read_groups, whole_blocks
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import shard_key
from teacher_cache.storage.base import open_storage


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """Targets that were built together. Missing blocks were never finished, or have lost a file since."""

    name: str
    targets: dict[str, str]
    sealed: bool
    missing_blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """A store at a glance. Bytes are on disk, of blocks that are whole; tokens are rows * seq_len of those blocks."""

    path: str
    manifest: Manifest
    groups: tuple[GroupInfo, ...]
    committed_rows: int
    bytes_per_array: dict[str, int]
    rows_per_array: dict[str, int]
    other_bytes: int

    @property
    def sealed(self) -> bool:
        """Whether all of it is finished."""
        return all(group.sealed for group in self.groups)

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks that are not whole in every group."""
        return tuple(sorted({block for group in self.groups for block in group.missing_blocks}))

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
        return self.bytes_per_array[array] / max(1, self.rows_per_array[array] * self.manifest.seq_len)

    def bits_per_value(self) -> dict[str, float]:
        """Bits on disk per component and position of a committed row, padding included, of each stream of vectors."""
        bits = {}
        layout = StoreLayout.of(self.manifest)
        for stream in layout.streams:
            per_token = sum(map(self.bytes_per_token, layout.arrays_in(stream.path)))
            bits[stream.path] = 8 * per_token / (self.manifest.views_of(stream.view) * stream.width)
        return bits

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            **asdict(self),
            "manifest": self.manifest.to_json(),
            "sealed": self.sealed,
            "missing_blocks": self.missing_blocks,
            "total_bytes": self.total_bytes,
            "declared_errors": declared_errors(self.manifest.targets),
            "bits_per_value": self.bits_per_value(),
            "bytes_per_token": {array: self.bytes_per_token(array) for array in self.bytes_per_array},
        }


def describe_store(path: str | Path) -> StoreInfo:
    """Look at a store without reading its targets.

    Raises:
        StoreError: there is no store of this format and version.
    """
    storage = open_storage(path)
    groups, sizes = read_groups(storage), storage.list()
    manifest = merge_manifests([group.manifest for group in groups])
    whole = {group.prefix: whole_blocks(group, read_commits(storage, group), sizes) for group in groups}
    bytes_per_array = {
        array: sum(sizes[shard_key(spec, block)] for block in whole[group.prefix])
        for group in groups
        for array, spec in group.arrays.items()
    }
    rows = {prefix: manifest.rows_in(blocks) for prefix, blocks in whole.items()}
    return StoreInfo(
        path=str(path),
        manifest=manifest,
        groups=tuple(_describe_group(group, whole[group.prefix]) for group in groups),
        committed_rows=rows[""],
        bytes_per_array=bytes_per_array,
        rows_per_array={array: rows[group.prefix] for group in groups for array in group.arrays},
        other_bytes=sum(sizes.values()) - sum(bytes_per_array.values()),
    )


def _describe_group(group: Group, whole: set[int]) -> GroupInfo:
    return GroupInfo(
        name=group.name,
        targets=describe_targets(group.manifest.targets),
        sealed=group.seal is not None,
        missing_blocks=tuple(sorted(set(range(group.manifest.blocks)) - whole)),
    )
