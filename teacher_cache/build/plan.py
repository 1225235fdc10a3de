"""What a build would write and how long it would take, found on a few rows and without writing anything.

The build's own code prepares the store in an overlay, which keeps in memory what would be written, and `trial.py` runs
a few rows through it. Cost: reading the corpus, which decides how many rows there are, and about half a minute of the
teacher at most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from teacher_cache.build.block_rows import code_bytes
from teacher_cache.build.blocks import BLOCKS_AT_ONCE
from teacher_cache.build.forecast import Forecast
from teacher_cache.build.inputs import BuildProgress, Silent, choose_batch_rows, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.sidecar import reach_attention, teacher_files
from teacher_cache.build.together import work_together
from teacher_cache.build.trial import ENOUGH_PER_COMPONENT, Trial
from teacher_cache.build.workers import Workers
from teacher_cache.contract.manifest import Manifest
from teacher_cache.device import most_memory
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import METADATA
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.overlay import Overlay
from teacher_cache.teacher.processes import Processes

"""Bytes of weights that Transformers writes into one file."""
State = Literal["new", "unfinished", "extended", "complete"]


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build will add to the place it writes to; nothing if the store is complete.

    `other_bytes` are the teacher, constants, metadata and commits, `other_objects` all objects but shards and commits.
    `free_bytes` is None where there is no telling. Estimates rest on `sample_rows` rows, which took `sample_seconds`;
    `seconds` is for one worker, from the first row of calibration on. `memory_bytes` is what the machine needs: the
    most that the sample took, and the blocks that wait to be written; `gpu_memory_bytes` the most that the sample took
    of a GPU. `flops` are the floating-point operations of all rows, where they were counted.
    """

    path: str
    state: State
    manifest: Manifest
    device: str
    groups: tuple[Forecast, ...]
    other_bytes: int
    free_bytes: int | None
    sample_rows: int
    sample_seconds: float
    seconds: float
    other_objects: int
    memory_bytes: int
    gpu_memory_bytes: int | None
    flops: int | None

    @property
    def tokens(self) -> int:
        """Positions of the rows that the teacher will read, padding included."""
        return sum(group.tokens for group in self.groups)

    @property
    def total_objects(self) -> int:
        """Objects that will be written: files, on a file system, in `folders` folders beside those of arrays."""
        return self.other_objects + sum(group.objects for group in self.groups)

    @property
    def folders(self) -> int:
        """Folders that a file system will have for the shards."""
        return sum(group.folders for group in self.groups)

    @property
    def total_bytes(self) -> int:
        """Everything that will be written."""
        return self.other_bytes + sum(group.total_bytes for group in self.groups)

    @property
    def fits(self) -> bool:
        """Whether there is room, as far as is known."""
        return self.free_bytes is None or self.total_bytes <= self.free_bytes

    @property
    def rough(self) -> bool:
        """Whether the sample is too small for calibration, so that sizes may be off by a tenth or more."""
        tokens = self.sample_rows * self.manifest.seq_len
        few = StoreLayout.of(self.manifest).nmse_streams and tokens < ENOUGH_PER_COMPONENT * self.manifest.widest
        return bool(few) and self.sample_rows < sum(group.rows for group in self.groups)

    @property
    def tokens_per_second(self) -> float:
        """Positions of rows per second of the whole build."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            **asdict(self),
            "manifest": self.manifest.to_json(),
            "groups": [group.to_json() for group in self.groups],
            "total_bytes": self.total_bytes,
            "tokens": self.tokens,
            "total_objects": self.total_objects,
            "folders": self.folders,
            "fits": self.fits,
            "rough": self.rough,
            "tokens_per_second": self.tokens_per_second,
        }


def plan_build(
    settings: BuildSettings,
    progress: BuildProgress | None = None,
    workers: Workers | None = None,
    *,
    count_flops: bool = False,
) -> BuildPlan:
    """What `build_cache` with the same settings would write, and how long it would take. Nothing is written.

    With `tensor_parallel` every one of several `workers` calls this. With `count_flops` a row or two more go through
    the teacher, to count its operations.

    Raises:
        DistillationError: whatever would stop the build before its first block, but for a lack of space.
    """
    progress = progress or Silent()
    if settings.tensor_parallel:
        return work_together(settings, workers or Workers(), partial(_plan, settings, progress, count_flops))
    return _plan(settings, progress, count_flops)


def _plan(
    settings: BuildSettings, progress: BuildProgress, count_flops: bool, processes: Processes | None = None
) -> BuildPlan:
    teacher, projections, rows, manifest = read_inputs(settings, progress, processes=processes)
    storage = open_storage(settings.out)
    draft = Overlay(storage)
    writers = groups_to_build(draft, manifest)
    of_teacher, teacher_objects = teacher_files(teacher, draft) if writers else (0, 0)
    batch_rows = choose_batch_rows(settings, teacher, manifest.seq_len)
    trial = Trial(draft, teacher, projections, rows, batch_rows, progress)
    if writers:
        projections |= reach_attention(teacher, [writer.group for writer in writers], projections)
        teacher.start()
    groups = tuple(trial.forecast(writer) for writer in writers)
    on_gpu = teacher.device.type == "cuda"
    waiting = min(_blocks_in_memory(), max((group.blocks for group in groups), default=0))
    return BuildPlan(
        path=settings.out,
        state=_state(storage, writers),
        manifest=manifest,
        device=str(teacher.device),
        groups=groups,
        other_bytes=of_teacher + trial.protocol_bytes + draft.added_bytes(),
        free_bytes=storage.free_bytes(),
        sample_rows=trial.sample_rows,
        sample_seconds=trial.sample_seconds,
        seconds=trial.calibration_seconds + sum(group.seconds for group in groups),
        # a seal and a list of commits for each group
        other_objects=teacher_objects + draft.added_objects() + 2 * len(groups),
        memory_bytes=most_memory("cpu") + waiting * manifest.block_rows * code_bytes(manifest),
        gpu_memory_bytes=most_memory("cuda") if on_gpu else None,
        flops=sum(map(trial.count_flops, writers)) if count_flops else None,
    )


def _state(storage: Storage, writers: list[GroupWriter]) -> State:
    if not writers:
        return "complete"
    there = storage.list()
    if not there:
        return "new"
    return "unfinished" if any(writer.group.prefix + METADATA in there for writer in writers) else "extended"


def _blocks_in_memory() -> int:
    """Blocks whose codes exist at a time: one that is computed, and those that are encoded and written."""
    return BLOCKS_AT_ONCE + 1
