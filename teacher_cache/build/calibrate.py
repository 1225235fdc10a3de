"""Calibrate the `nmse` streams of a store before its first block is written, or read what was calibrated.

The first rows of the store (they are shuffled, so they are a sample) are read by the teacher once more: half of them
for the rotations, a quarter for the steps and packings, a quarter to measure the error that the manifest declares.
Constants are written first and the manifest's records after them, before any block. So a build that was killed finds
either no records, and calibrates again, or all of them, and codes exactly as the first one did. Cost: at most 384 rows
through the teacher, one eigenproblem of the hidden width per stream, and up to 16,384 tokens of each stream in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from teacher_cache.build.passes import run_streams
from teacher_cache.codecs.nmse import Transform, calibrate
from teacher_cache.codecs.ordinary import measure_ordinary
from teacher_cache.codecs.sample import CalibrationSample, share_rows
from teacher_cache.codecs.sinks import describe_kept
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VectorStream
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.transforms import keep_calibration, stream_projections
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.teacher.teacher import Teacher

ReadStreams = Callable[[Sequence[VectorStream], range], Iterable[tuple[VectorStream, torch.Tensor, torch.Tensor]]]
"""What streams keep of a range of rows: each stream with values [B, T, D] and real positions [B, T], in any pieces."""


def ensure_calibrated(
    writer: GroupWriter,
    teacher: Teacher,
    rows: Rows,
    batch_rows: int,
    projections: Mapping[int, AttentionProjections],
    note: Callable[[str], None],
) -> GroupWriter:
    """The group with a calibrated manifest, constants written. `note` is told what is going on.

    Raises:
        TeacherError: the teacher gives values that are not finite.
    """
    layout = writer.group.layout
    if not layout.uncalibrated:
        return writer
    return keep_calibration(writer, calibrate_streams(layout, teacher, rows, batch_rows, projections, note))


def calibrate_streams(
    layout: StoreLayout,
    teacher: Teacher,
    rows: Rows,
    batch_rows: int,
    projections: Mapping[int, AttentionProjections],
    note: Callable[[str], None],
) -> dict[str, tuple[Transform, TransformRecord]]:
    """What calibration finds for each `nmse` stream, by path. Nothing is written."""
    read = partial(_run, layout.manifest, teacher, rows, batch_rows)
    return calibrate_on(layout, read, projections, note)


def calibrate_on(
    layout: StoreLayout,
    read: ReadStreams,
    projections: Mapping[int, AttentionProjections],
    note: Callable[[str], None],
) -> dict[str, tuple[Transform, TransformRecord]]:
    """`calibrate_streams` on what `read` gives of the first rows, whoever computed it."""
    manifest, streams = layout.manifest, layout.nmse_streams
    used = sum(share_rows(manifest.rows, manifest.tokens_per_row, manifest.widest))
    note(f"calibrating {len(streams)} streams on the first {min(used, manifest.rows)} rows")
    samples = _collect(manifest, streams, read, projections)
    found = {}
    for stream in streams:
        assert stream.target_nmse is not None
        maps = stream_projections(stream, projections)
        sample = samples.pop(stream.path)
        transform, record = found[stream.path] = calibrate(sample, stream.target_nmse, maps)
        note(f"  {stream.path}: NMSE {record.nmse:.3g} on rows held out{describe_kept(record.sinks)}")
        ordinary = measure_ordinary(torch.cat(sample.check), transform, maps, record.sinks)
        if (warning := ordinary.note(stream.path, stream.target_nmse)) is not None:
            note(warning)
    return found


@torch.inference_mode()
def _collect(
    manifest: Manifest,
    streams: Sequence[VectorStream],
    read: ReadStreams,
    projections: Mapping[int, AttentionProjections],
) -> dict[str, CalibrationSample]:
    fit, tune, check = share_rows(manifest.rows, manifest.tokens_per_row, manifest.widest)
    samples = {stream.path: CalibrationSample(stream_projections(stream, projections)) for stream in streams}
    start = 0
    for name, count in (("fit", fit), ("tune", tune), ("check", check)):
        # a store of one or two rows has the same rows for everything
        start = min(start, manifest.rows - count)
        for stream, values_BTD, real_BT in read(streams, range(start, start + count)):
            _add(samples[stream.path], name, values_BTD[real_BT])
        start += count
    return samples


def _run(
    manifest: Manifest, teacher: Teacher, rows: Rows, batch_rows: int, streams: Sequence[VectorStream], wanted: range
) -> Iterator[tuple[VectorStream, torch.Tensor, torch.Tensor]]:
    for _, stream, values_BTD, real_BT in run_streams(manifest, teacher, streams, rows, wanted, batch_rows):
        yield stream, values_BTD, real_BT


def _add(sample: CalibrationSample, part: str, values_ND: torch.Tensor) -> None:
    if part == "fit":
        sample.fit(values_ND)
    else:
        (sample.tune if part == "tune" else sample.check).append(values_ND.float().cpu())
