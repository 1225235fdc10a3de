"""A few rows through the code of a build: what the blocks of a group will take in bytes and seconds.

    rows -> timing pass -> calibration -> coded blocks -> shards in memory -> forecast

The rows of a store are shuffled, so its first missing rows are a sample. Only calibration differs from that of a build.
So few rows give a poorer rotation, which costs more bits than that of the build will. But it costs fewer on the rows
that it was fitted on, by about as much as it costs more on others. So the rotation is fitted on some rows of the sample
and measured on all of them, in a share chosen so that both effects together leave what the build's rotation will cost.

Cost: at most 64 rows through the teacher, twice where there is something to calibrate; fewer, down to 8, where those
would take longer than half a minute. How close it comes, on a teacher of width 384: within 4% of the bits of any stream
from 10 sampled tokens per component on (30 rows of 128 tokens), within 2.5% from 20 on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from teacher_cache.build.block import compute_block
from teacher_cache.build.blocks import Computed
from teacher_cache.build.encode import BlockTargets
from teacher_cache.build.forecast import Forecast, MeasuredSample, forecast
from teacher_cache.build.inputs import BuildProgress
from teacher_cache.build.passes import TeacherPass, run_streams, run_views
from teacher_cache.build.sidecar import write_projections
from teacher_cache.codecs.nmse import Transform, calibrate
from teacher_cache.codecs.sample import CalibrationSample, share_rows
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VectorStream
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.groups import Group, read_groups
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    Commit,
    ObjectDigest,
    Seal,
    array_of,
    list_commit_hashes,
    shard_key,
)
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.format.transforms import keep_calibration, load_quantisers, stream_projections
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.storage.overlay import Overlay
from teacher_cache.teacher.teacher import Teacher

_MOST_ROWS, _LEAST_ROWS = 64, 8
_TEACHER_SECONDS = 30.0
ENOUGH_PER_COMPONENT = 10
"""Sampled tokens for each component of a vector from which on calibration of the sample is like that of a build."""
_TIMED_ROWS = 2
_TIMED_PLACES = 64
_TUNED_TOKENS = 2**14
"""Tokens of which all values are held; as many as a build holds."""


class Trial:
    """Forecasts one group of a draft after another, and adds up what the samples took."""

    def __init__(
        self,
        draft: Overlay,
        teacher: Teacher,
        projections: Mapping[int, AttentionProjections],
        rows: Rows,
        batch_rows: int,
        progress: BuildProgress,
    ) -> None:
        self.draft = draft
        self.teacher = teacher
        self.projections = projections
        self.rows = rows
        self.batch_rows = batch_rows
        self.progress = progress
        self.sample_rows = 0
        self.sample_seconds = 0.0
        self.calibration_seconds = 0.0
        self.protocol_bytes = 0

    def forecast(self, writer: GroupWriter) -> Forecast:
        """What the missing blocks of a group will take; what a build writes before them goes to the draft."""
        started = time.monotonic()
        manifest = writer.manifest
        missing = sorted(set(range(manifest.blocks)) - writer.committed())
        uncalibrated = writer.group.layout.uncalibrated
        wanted = self._affordable(writer.group.layout, passes=2 if uncalibrated else 1)
        self.progress.note(f"trying {wanted} rows")
        write_projections(self.draft, writer.group.layout, self.projections)
        for layer in manifest.targets.hidden_layers():
            write_constant(self.draft, f"hidden/{layer}/variance", np.array(0.0))
        if uncalibrated:
            writer = keep_calibration(writer, self._calibrate(manifest, uncalibrated, wanted))
        writer.write_metadata()
        sample = self._sample(writer, missing, wanted)
        self.sample_rows += sample.rows
        self.sample_seconds += time.monotonic() - started
        self.protocol_bytes += _protocol_bytes(writer.group, missing, self.draft.written)
        return forecast(writer.group, missing, sample)

    def count_flops(self, writer: GroupWriter) -> int:
        """Floating-point operations of the missing blocks of a group, from those of a row or two. After `forecast`."""
        missing = sorted(set(range(writer.manifest.blocks)) - writer.committed())
        rows = writer.manifest.rows_in(missing)
        if not rows:
            return 0
        group = next(group for group in read_groups(self.draft) if group.prefix == writer.group.prefix)
        quantisers = load_quantisers(self.draft, group.layout, self.projections)
        first, last = group.manifest.block_range(missing[0])
        part = self.rows.read(first, min(last, first + _TIMED_ROWS))
        with FlopCounterMode(display=False) as counter:
            compute_block(group.layout, self.teacher, quantisers, part, self.batch_rows)
        return int(counter.get_total_flops() * rows / len(part.row_id_B))

    def _affordable(self, layout: StoreLayout, passes: int) -> int:
        """How many rows the teacher reads so many times in the time there is, by timing it on a few of them."""
        manifest = layout.manifest
        part = self.rows.read(0, min(_TIMED_ROWS, manifest.rows))
        for _ in ("to warm up", "to be timed"):
            started = time.monotonic()
            for one in run_views(
                manifest, self.teacher, layout.streams, part, self.batch_rows, manifest.targets.views()
            ):
                if manifest.targets.logits is not None and one.kept_BT is not None:
                    _run_head(self.teacher, one)
                one.outputs.final_BTD.sum().item()  # wait for the device
        seconds = (time.monotonic() - started) / len(part.row_id_B)
        affordable = int(_TEACHER_SECONDS / max(seconds * passes, 1e-9))
        return min(max(affordable, _LEAST_ROWS), _MOST_ROWS, manifest.rows)

    def _calibrate(
        self, manifest: Manifest, streams: Sequence[VectorStream], wanted: int
    ) -> dict[str, tuple[Transform, TransformRecord]]:
        """Transforms from the first rows whose codes take as many bits as those of the build."""
        started = time.monotonic()
        samples = self._collect(manifest, streams, wanted)
        used = sum(share_rows(manifest.rows, manifest.tokens_per_row, manifest.widest))
        collected = time.monotonic()
        found = {}
        for stream in streams:
            assert stream.target_nmse is not None
            maps = stream_projections(stream, self.projections)
            found[stream.path] = calibrate(samples.pop(stream.path), stream.target_nmse, maps)
        self.calibration_seconds += (collected - started) * used / wanted + time.monotonic() - collected
        return found

    @torch.inference_mode()
    def _collect(
        self, manifest: Manifest, streams: Sequence[VectorStream], wanted: int
    ) -> dict[str, CalibrationSample]:
        samples = {stream.path: CalibrationSample(stream_projections(stream, self.projections)) for stream in streams}
        fitted = fitted_rows(manifest, wanted)
        held = max(4, _TUNED_TOKENS // manifest.seq_len)
        for first, stream, values_BTD, real_BT in run_streams(
            manifest, self.teacher, streams, self.rows, range(wanted), self.batch_rows
        ):
            for row, (values_TD, real_T) in enumerate(zip(values_BTD, real_BT, strict=True), first):
                _add(samples[stream.path], row, values_TD[real_T], row in fitted, row < held)
        for sample in samples.values():
            sample.check = sample.check or sample.tune
        return samples

    def _sample(self, writer: GroupWriter, missing: list[int], wanted: int) -> MeasuredSample:
        """The first missing rows, coded as the build codes them; what the build does beside the teacher counts less."""
        layout = writer.group.layout
        quantisers = load_quantisers(self.draft, layout, self.projections)
        sizes: Counter[str] = Counter()
        taken, blocks, computing, packing = 0, 0, 0.0, 0.0
        for block in missing:
            first, last = writer.manifest.block_range(block)
            rows = self.rows.read(first, min(last, first + wanted - taken))
            started = time.monotonic()
            targets = compute_block(layout, self.teacher, quantisers, rows, self.batch_rows)
            computed = time.monotonic()
            sizes.update(shard_sizes(writer, block, targets))
            computing, packing = computing + computed - started, packing + time.monotonic() - computed
            taken, blocks = taken + len(rows.row_id_B), blocks + 1
            if taken >= wanted:
                break
        empty = shard_sizes(writer, 0, BlockTargets(layout, quantisers)) if missing else {}
        seconds = computing + packing / (os.cpu_count() or 1)
        return MeasuredSample(rows=taken, blocks=blocks, bytes_per_array=sizes, empty_bytes=empty, seconds=seconds)


@torch.inference_mode()
def _run_head(teacher: Teacher, one: TeacherPass) -> None:
    """The head at the positions of a causal teacher's rows, which takes longer than the layers of a small one.

    That of a masked LM is run at a seventh of them, which does not matter to how many rows are tried.
    """
    head = teacher.head()
    for part_PD in one.outputs.final_BTD.flatten(0, 1).split(_TIMED_PLACES):
        head(part_PD)


def fitted_rows(manifest: Manifest, sample: int) -> set[int]:
    """Which of so many first rows to fit rotations on so that all of them together cost what the store's rows will.

    With n rows fitted, rows fitted gain e / n bits against the best rotation and others lose e / n (to first order).
    The build fits N rows of its R: on average its rows lose (1 - 2 N / R) e / N. A sample of which the share s is
    fitted loses (1 - 2 s) e / (s sample). Both are the same at s = 1 / (2 + (1 - 2 N / R) sample / N).
    """
    fitted = share_rows(manifest.rows, manifest.tokens_per_row, manifest.widest)[0]
    share = 1 / (2 + (1 - 2 * fitted / manifest.rows) * sample / fitted)
    return {row for row in range(sample) if int((row + 1) * share) > int(row * share)} or {0}


def _add(sample: CalibrationSample, row: int, values_ND: torch.Tensor, fitted: bool, held: bool) -> None:
    if fitted:
        sample.fit(values_ND)
    if held:
        # pairs of rows: the rows that are fitted are spread over both
        (sample.tune if row % 4 < 2 else sample.check).append(values_ND.float().cpu())


def shard_sizes(writer: GroupWriter, block: int, targets: Computed) -> dict[str, int]:
    """Bytes of each array's shard of a block. Nothing is written."""
    return {array_of(key): len(data) for key, data in writer.encode_block(block, targets.finish())}


def _protocol_bytes(group: Group, missing: list[int], objects: Iterable[str]) -> int:
    """Commits and seal of a group in which these objects lie beside the blocks."""
    manifest, digest = group.manifest, ObjectDigest(size=10**6, sha256="0" * 64)
    commit = Commit(
        block=manifest.blocks - 1,
        rows=manifest.block_range(manifest.blocks - 1),
        shards={shard_key(spec, manifest.blocks - 1): digest for spec in group.arrays.values()},
    )
    listed = list_commit_hashes((digest.sha256,) * manifest.blocks)
    seal = Seal(
        rows=manifest.rows,
        blocks=manifest.blocks,
        bytes_per_array=dict.fromkeys(group.arrays, digest.size),
        objects=dict.fromkeys([*objects, group.prefix + COMMIT_HASHES], digest),
        format_version=manifest.format_version,
    )
    return len(seal.to_bytes()) + len(listed) + len(commit.to_bytes()) * len(missing)
