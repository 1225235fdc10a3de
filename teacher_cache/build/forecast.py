"""What the missing blocks of a group will take on the disk, extrapolated from some of its rows as they are coded.

A block costs what its chunks, headers and indices cost without any row, and beyond that nearly the same for each row:
rows are shuffled, and padding at the end of a block compresses to nothing. So the bytes of all missing blocks follow
from those of a few rows. `build` forecasts from its first block before it writes it, `plan` from a small sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.contract.targets import describe_targets
from teacher_cache.errors import SpaceError
from teacher_cache.format.groups import Group
from teacher_cache.storage.base import Storage
from teacher_cache.wording import format_bytes, format_duration

INPUTS = "inputs"
"""What the token ids, lengths and masks of rows are called among the targets."""


_WHAT_TO_DO = {
    False: "no block has been written; free some space, choose another --out, or keep less: without a block the same "
    "--out takes other settings, such as a coarser --precision like nmse:1e-1, fewer --layers or, for a new store, "
    "fewer --max-rows",
    True: "nothing more has been written; free some space and run the same command again, or build a store that keeps "
    "less in another --out",
}


@dataclass(frozen=True, kw_only=True)
class MeasuredSample:
    """Bytes of the shards of `rows` rows by array, in `blocks` blocks of which each may be filled in part only.

    `empty_bytes` are those of one block without rows; empty where that is not worth knowing: the rows then fill their
    blocks as those of the whole store do. `seconds` is how long the rows took.
    """

    rows: int
    blocks: int
    bytes_per_array: Mapping[str, int]
    empty_bytes: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a build will write into one group: its missing blocks. `tokens` are their positions, padding included.

    `objects` are the shards and commits; on a file system they lie in as many `folders` as all but the last part of
    their names make.
    """

    group: str
    targets: Mapping[str, str]
    rows: int
    blocks: int
    tokens: int
    bytes_per_array: Mapping[str, int]
    seconds: float
    objects: int
    folders: int

    @property
    def total_bytes(self) -> int:
        """All arrays."""
        return sum(self.bytes_per_array.values())

    def bytes_per_target(self) -> dict[str, int]:
        """Bytes by target, as `describe_targets` calls it, after those of the inputs.

        A target that holds no arrays of its own, such as attention that shares a hidden state, has none.
        """
        found = dict.fromkeys((INPUTS, *self.targets), 0)
        for path, size in self.bytes_per_array.items():
            found[_target_of(path)] += size
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            **asdict(self),
            "total_bytes": self.total_bytes,
            "bytes_per_target": self.bytes_per_target(),
            "bytes_per_token": {path: size / max(1, self.tokens) for path, size in self.bytes_per_array.items()},
        }

    def describe(self, free_bytes: int | None, of_teacher: int = 0) -> str:
        """One line for the user; `of_teacher` are the bytes of the teacher's copy that lies there by now."""
        rate = self.total_bytes / max(1, self.tokens)
        beside = f"; the teacher's copy took {format_bytes(of_teacher)}" if of_teacher else ""
        room = "free space unknown" if free_bytes is None else f"{format_bytes(free_bytes)} free"
        return (
            f"to write: {format_bytes(self.total_bytes)} for {self.rows} rows ({rate:.1f} bytes/token); {room}; about "
            f"{format_duration(self.seconds)}{beside}"
        )


def forecast(group: Group, missing: Iterable[int], sample: MeasuredSample) -> Forecast:
    """What the blocks `missing` of a group will take, by a sample of it."""
    manifest = group.manifest
    blocks = list(missing)
    rows = manifest.rows_in(blocks)
    return Forecast(
        group=group.name,
        targets=describe_targets(manifest.targets),
        rows=rows,
        blocks=len(blocks),
        tokens=rows * manifest.seq_len,
        bytes_per_array={path: _extrapolate(path, rows, len(blocks), sample) for path in group.arrays},
        seconds=sample.seconds * rows / max(1, sample.rows),
        objects=len(blocks) * (len(group.arrays) + 1),
        folders=len(blocks) * sum(len(spec.block_shape) for spec in group.arrays.values()),
    )


def _extrapolate(path: str, rows: int, blocks: int, sample: MeasuredSample) -> int:
    empty = sample.empty_bytes.get(path, 0)
    of_rows = sample.bytes_per_array.get(path, 0) - sample.blocks * empty
    return round(blocks * empty + of_rows * rows / max(1, sample.rows))


def refuse_without_room(storage: Storage, needed: int, *, begun: bool = False) -> None:
    """Stop what cannot be finished before it begins, or before it goes on if blocks are there already.

    Raises:
        SpaceError: there is less room than is needed.
    """
    free = storage.free_bytes()
    if free is not None and free < needed:
        raise SpaceError(
            f"the build needs about {format_bytes(needed)} more and {storage.location!r} has {format_bytes(free)} "
            f"free: it would stop half-way, so {_WHAT_TO_DO[begun]}, or give --force to build as far as the space goes"
        )


def _target_of(path: str) -> str:
    kind, _, rest = path.partition("/")
    if kind in ("hidden", "attention"):
        return f"{kind} {rest.partition('/')[0]}"
    return kind if kind == "logits" else INPUTS
