"""The one loop that chains corpus, teacher, targets and store.

    rows (packed, shuffled) -> calibration, views -> one teacher pass per view -> coded block -> shards, commit -> seal

Each block is computed from its rows alone, in batches that start at its first row, so that it comes out the same
whether the build ran through or was killed and started again. How blocks are written beside the teacher is said in
`blocks.py`.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from teacher_cache.build.block import ComputedBlock, Overlap, compute_block
from teacher_cache.build.blocks import write_blocks
from teacher_cache.build.calibrate import ensure_calibrated
from teacher_cache.build.forecast import refuse_without_room
from teacher_cache.build.inputs import BuildProgress, Silent, choose_batch_rows, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.sidecar import (
    reach_attention,
    teacher_files,
    write_projections,
    write_teacher,
    write_variances,
)
from teacher_cache.build.together import work_together
from teacher_cache.build.workers import Workers
from teacher_cache.build.writable import refuse_unwritable
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import describe_targets
from teacher_cache.corpus.corpus import Rows
from teacher_cache.errors import StoreError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.transforms import load_quantisers
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.processes import Processes
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.threads import cores_beside

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did: rows in the store, rows that this run computed, bytes it wrote, seconds up to the seal."""

    path: str
    rows: int
    computed_rows: int
    written_bytes: int
    seconds: float


def build_cache(
    settings: BuildSettings, progress: BuildProgress | None = None, workers: Workers | None = None
) -> BuildReport:
    """Build a store, finish one that was started with the same settings, or add targets to a finished one.

    Every one of several `workers` calls this with the same settings. They share the blocks, each with a teacher of its
    own, or with `tensor_parallel` one teacher, and the first builds.

    Raises:
        DistillationError: anything the user can mend; see the subclasses.
    """
    progress = Silent() if progress is None else progress
    workers = workers or Workers()
    if settings.tensor_parallel:
        return work_together(settings, workers, partial(_build, settings, progress, Workers()))
    return _build(settings, progress, workers)


def _build(
    settings: BuildSettings, progress: BuildProgress, workers: Workers, processes: Processes | None = None
) -> BuildReport:
    storage = open_storage(settings.out)
    look = partial(refuse_unwritable, storage if workers.first and isinstance(storage, LocalStorage) else None)
    look(None)
    teacher, projections, rows, manifest = read_inputs(settings, progress, look, processes)
    job = _Job(settings, teacher, projections, rows, storage, workers, progress)
    with job.storage.lock() if workers.first else nullcontext():
        return job.run(manifest)


class _Job:
    """One worker's share of a build."""

    def __init__(
        self,
        settings: BuildSettings,
        teacher: Teacher,
        projections: dict[int, AttentionProjections],
        rows: Rows,
        storage: Storage,
        workers: Workers,
        progress: BuildProgress,
    ) -> None:
        self.settings = settings
        self.teacher = teacher
        self.projections = projections
        self.rows = rows
        self.storage = storage
        self.workers = workers
        self.progress = progress
        self.started = 0.0
        self.of_teacher = 0

    def run(self, manifest: Manifest) -> BuildReport:
        """Prepare (one worker), compute and commit blocks (every worker), seal (one worker)."""
        batch_rows = choose_batch_rows(self.settings, self.teacher, manifest.seq_len)
        _log.info("chosen: %d tokens a row, %d rows a pass of the teacher", manifest.seq_len, batch_rows)
        self.started = time.monotonic()
        self._compare_inputs(manifest)
        work = self.workers.share("work", self._prepare(manifest, batch_rows) if self.workers.first else None)
        groups = {group.prefix: group for group in read_groups(self.storage) if group.prefix in work}
        if not self.workers.first and work:
            self.projections |= reach_attention(self.teacher, groups.values(), self.projections)
            self.teacher.start()
        with Overlap(self.teacher.device) as overlap:
            for prefix, group in groups.items():
                self._build_blocks(GroupWriter(self.storage, group), work[prefix], batch_rows, overlap)
        self.workers.wait_for_all("blocks are written")
        if self.workers.first:
            for group in groups.values():
                write_variances(self.storage, group.manifest, complete=groups)
                GroupWriter(self.storage, group).seal()
                _log.info("sealed %s", group.name)
        self.workers.wait_for_all("groups are sealed")
        return BuildReport(
            path=self.settings.out,
            rows=manifest.rows,
            computed_rows=self.workers.add("rows", 0),
            written_bytes=self.workers.add("bytes", 0),
            seconds=time.monotonic() - self.started if groups else 0.0,
        )

    def _compare_inputs(self, manifest: Manifest) -> None:
        """Refuse workers that would put other rows, or another teacher's outputs, into the same store.

        Raises:
            StoreError: this worker's inputs are not those of the first one, or another worker's are not.
        """
        theirs = Manifest.from_json(self.workers.share("manifest", manifest.to_json()))
        differences = theirs.differences(manifest)
        self.workers.add("unlike", 1 if differences else 0)
        self.workers.wait_for_all("inputs are compared")
        if differences:
            lines = "".join(f"\n  {name}: worker 0 has {a!r}, this one {b!r}" for name, a, b in differences)
            raise StoreError(
                f"worker {self.workers.rank} of {self.workers.count} was given other inputs than worker 0:{lines}\n"
                "Together they would write a store of mixed contents, so nothing was written; give every worker the "
                "same teacher, text and flags"
            )
        unlike = self.workers.add("unlike", 0)
        if unlike:
            raise StoreError(
                f"{unlike} of {self.workers.count} workers have other inputs than worker 0, as their own messages say: "
                "nothing was written; give every worker the same teacher, text and flags"
            )

    def _prepare(self, manifest: Manifest, batch_rows: int) -> dict[str, list[int]]:
        """Everything that is there before the first block; returns the missing blocks of each group that needs work."""
        writers = groups_to_build(self.storage, manifest)
        if not writers:
            self.progress.note(f"{self.settings.out} is complete already: {manifest.rows} rows; nothing to do")
            return {}
        self.projections |= reach_attention(self.teacher, [writer.group for writer in writers], self.projections)
        writers = [writer.unseal() for writer in writers]
        if not self.settings.force:
            refuse_without_room(self.storage, teacher_files(self.teacher, self.storage)[0])
        self.of_teacher = write_teacher(self.storage, self.teacher)
        self.started = time.monotonic()  # what is reported is the passes of the teacher and what follows from them
        self.teacher.start()
        work = {}
        for writer in writers:
            self._announce(writer)
            write_projections(self.storage, writer.group.layout, self.projections)
            writer = ensure_calibrated(
                writer, self.teacher, self.rows, batch_rows, self.projections, self.progress.note
            )
            writer.write_metadata()
            if (lost := writer.compare_lost_seal()) is not None:
                self.progress.note(lost)
            work[writer.group.prefix] = sorted(set(range(manifest.blocks)) - writer.committed())
        return work

    def _announce(self, writer: GroupWriter) -> None:
        manifest, corpus = writer.manifest, writer.manifest.corpus
        self.progress.note(
            f"{manifest.rows} rows x {manifest.seq_len} tokens of {corpus.rows} in the corpus ({corpus.documents} "
            f"documents), {manifest.blocks} blocks"
        )
        for name, what in describe_targets(manifest.targets).items():
            self.progress.note(f"  {name}: {what}")

    def _build_blocks(self, writer: GroupWriter, missing: list[int], batch_rows: int, overlap: Overlap) -> None:
        """Compute, code and commit this worker's share of the missing blocks of a group."""
        manifest = writer.manifest
        quantisers = load_quantisers(self.storage, writer.group.layout, self.projections)

        def compute(block: int) -> ComputedBlock:
            rows = self.rows.read(*manifest.block_range(block))
            return compute_block(writer.group.layout, self.teacher, quantisers, rows, batch_rows, overlap)

        cores = cores_beside(self.teacher.device)
        write_blocks(
            writer,
            missing,
            compute,
            workers=self.workers,
            progress=self.progress,
            force=self.settings.force,
            of_teacher=self.of_teacher,
            cores=cores,
        )
