"""A smaller store from a larger one, without the teacher.

    source (checked) -> plan -> recalibration -> constants, teacher's files -> blocks, each with its commit -> seal

The derived store is one like any other: a block exists once it is committed, so that a run which was killed goes on
where it stopped. All that can be refused is refused before anything is written. Cost: what changes its codec, or moves
to other rows of a block, is decoded and coded again, block by block, a block to a thread; all else is copied.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import describe_targets
from teacher_cache.derive.origins import Derivation, plan_derivation
from teacher_cache.derive.recalibrate import Calibrated, load_coders, recalibrate
from teacher_cache.derive.recode import BlockDeriver
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.derive.source_rows import SourceRows
from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.protocol import TEACHER, Commit, has_teacher, read_teacher_files, write_teacher_files
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.small_arrays import has_constant, read_constant, write_constant
from teacher_cache.format.transforms import keep_calibration
from teacher_cache.format.writer import GroupWriter, ShardThreads
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.threads import in_threads, usable_cores

_MOST_AT_ONCE = 4
"""Blocks that are derived at a time."""


class DeriveProgress(Protocol):
    """What a derivation tells while it runs."""

    def note(self, text: str) -> None:
        """One line that the user should see."""

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """So many rows are safe on the disk, of which `written_bytes` bytes were written by this run."""


@dataclass(frozen=True, kw_only=True)
class DeriveReport:
    """What was done: rows in the store, rows that this run wrote, bytes and seconds of that; bytes of both stores."""

    path: str
    rows: int
    written_rows: int
    written_bytes: int
    seconds: float
    array_bytes: int
    source_array_bytes: int


class Silent:
    """A `DeriveProgress` that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """Nothing."""


def derive_store(settings: DeriveSettings, progress: DeriveProgress | None = None) -> DeriveReport:
    """Derive a store, or finish one that was begun with the same settings. `progress` is told how far it is.

    Raises:
        DistillationError: anything the user can mend; see the subclasses.
    """
    return derive_into(open_storage(settings.dst), settings, Silent() if progress is None else progress)


def derive_into(storage: Storage, settings: DeriveSettings, progress: DeriveProgress) -> DeriveReport:
    """`derive_store` for a destination that is at hand."""
    reader = CacheReader.open(settings.src)
    derivation = plan_derivation(reader.layout, settings)
    _refuse_same_place(reader.storage, storage)
    job = _Job(SourceRows(reader), derivation, storage, progress)
    begun = job.is_calibrated()
    job.announce()
    # before anything is written, as it may find that the precision asked for is not to be had
    found = {} if begun else recalibrate(job.source, derivation, progress.note)
    with storage.lock():
        return job.run(found)


class _Job:
    """One derivation."""

    def __init__(self, source: SourceRows, derivation: Derivation, storage: Storage, progress: DeriveProgress) -> None:
        self.source = source
        self.derivation = derivation
        self.storage = storage
        self.progress = progress

    def is_calibrated(self) -> bool:
        """Whether the destination is ours and has its constants.

        Raises:
            StoreError: it holds something else, or was begun from another source.
        """
        if not self.storage.list():
            return False
        # what `kdcache build` has added since is none of a derivation's business
        have = read_groups(self.storage)[0].manifest
        _refuse_differences(self.storage, have, self.derivation)
        if have.calibration:
            load_coders(self.source, self.derivation, self.storage)
        return bool(have.calibration)

    def announce(self) -> None:
        """Say what is made."""
        manifest = self.derivation.manifest
        self.progress.note(
            f"{manifest.rows} of {self.source.manifest.rows} rows x {manifest.seq_len} tokens, {manifest.blocks} blocks"
        )
        for name, what in describe_targets(manifest.targets).items():
            self.progress.note(f"  {name}: {what}")

    def run(self, found: dict[str, Calibrated]) -> DeriveReport:
        """Constants, blocks, seal. The storage is locked."""
        started, rows, size = time.monotonic(), 0, 0
        manifest, path = self.derivation.manifest, self.storage.location
        writers = groups_to_build(self.storage, manifest)
        if not writers:
            self.progress.note(f"{path} is complete already: {manifest.rows} rows; nothing to do")
        for writer in writers:
            writer = self._write_constants(writer.unseal(), found)
            if (lost := writer.compare_lost_seal()) is not None:
                self.progress.note(lost)
            missing = sorted(set(range(manifest.blocks)) - writer.committed())
            there = manifest.rows - manifest.rows_in(missing)
            self.progress.committed(there, manifest.rows, 0)
            with closing(self._write_blocks(writer, missing)) as commits:
                for commit in commits:
                    rows += commit.rows[1] - commit.rows[0]
                    size += sum(digest.size for digest in commit.shards.values())
                    self.progress.committed(there + rows, manifest.rows, size)
            writer.seal()
        return DeriveReport(
            path=path,
            rows=manifest.rows,
            written_rows=rows,
            written_bytes=size,
            seconds=time.monotonic() - started,
            array_bytes=_array_bytes(self.storage),
            source_array_bytes=_array_bytes(self.source.reader.storage),
        )

    def _write_constants(self, writer: GroupWriter, found: dict[str, Calibrated]) -> GroupWriter:
        """Everything that is there before the first block; returns the writer of the calibrated group."""
        _copy_teacher(self.source.reader, self.storage)
        if found and not writer.manifest.calibration:
            writer = keep_calibration(writer, found)
        for path, spec in writer.group.layout.constants.items():
            # projections and variances; those of the transforms are there
            if not has_constant(self.storage, path):
                write_constant(self.storage, path, read_constant(self.source.reader.storage, path, spec))
        writer.write_metadata()
        return writer

    def _write_blocks(self, writer: GroupWriter, missing: list[int]) -> Generator[Commit]:
        """Derive and commit blocks, a few at a time."""
        coders = load_coders(self.source, self.derivation, self.storage)
        deriver = BlockDeriver(self.source, self.derivation, writer.group.layout, coders)
        cores = usable_cores()
        with ShardThreads(cores) as threads:

            def write(block: int) -> Commit:
                return writer.write_block(block, deriver.derive(block), threads)

            at_once = min(cores, _MOST_AT_ONCE)
            yield from in_threads(write, missing, threads=at_once, ahead=at_once)


def _copy_teacher(reader: CacheReader, storage: Storage) -> None:
    if has_teacher(storage):
        return
    folder, files = reader.teacher_folder(), read_teacher_files(reader.storage)
    for key in files:
        storage.write_file(key, folder / key.removeprefix(f"{TEACHER}/"))
    write_teacher_files(storage, files)


def _array_bytes(storage: Storage) -> int:
    return sum(sum(group.seal.bytes_per_array.values()) for group in read_groups(storage) if group.seal is not None)


def _refuse_same_place(source: Storage, storage: Storage) -> None:
    """A store within the other one, or in its place, would spoil it."""
    if isinstance(source, LocalStorage) and isinstance(storage, LocalStorage):
        old, new = Path(source.location).resolve(), Path(storage.location).resolve()
        same = new == old or old in new.parents
    else:
        same = f"{storage.location.rstrip('/')}/".startswith(f"{source.location.rstrip('/')}/")
    if same:
        raise SettingsError(
            f"DST {storage.location!r} lies in SRC {source.location!r}: the store that is read would be written over; "
            "give another place"
        )


def _refuse_differences(storage: Storage, have: Manifest, derivation: Derivation) -> None:
    """Refuse to go on with a store that was not begun with these settings, from this source."""
    wanted = derivation.manifest
    lines = [f"{name}: it has {mine!r}, asked for is {theirs!r}" for name, mine, theirs in have.differences(wanted)]
    if not lines and have.targets != wanted.targets:
        lines.append("attention: it is held in another form")
    if not lines and have.calibration:
        lines += [
            f"{origin.target.path}: it has other codes than {origin.source.path} of SRC"
            for origin in derivation.origins
            if origin.way == "kept"
            and have.calibration.get(origin.target.path)
            != derivation.source.manifest.calibration.get(origin.source.path)
        ]
    if lines:
        raise StoreError(
            f"{storage.location!r} is another store:"
            + "".join(f"\n  {line}" for line in lines)
            + "\nMixing them would "
            "train on wrong targets; repeat the settings and SRC that it was begun with, or give another DST"
        )
