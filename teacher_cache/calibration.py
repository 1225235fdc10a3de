"""Calibrate the `nmse` streams of a store before its first block is written, or read what was calibrated.

The first rows of the store (they are shuffled, so they are a sample) are read by the teacher once more: half of them
for the rotations, a quarter for the steps and packings, a quarter to measure the error that the manifest declares.
Constants are written first and the manifest's records after them: a store has either no records, and then no blocks
either and is calibrated again, or all of them, and then a resumed build codes exactly as the first one did. Cost: at
most 384 rows through the teacher, one eigenproblem of the hidden width per stream, and up to 16,384 tokens of each
stream in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from teacher_cache.contract import Manifest, TransformRecord, nmse_target
from teacher_cache.corpus import Rows
from teacher_cache.layout import VectorStream, vector_streams
from teacher_cache.passes import run_views, stream_values
from teacher_cache.reader import read_transform
from teacher_cache.relations import AttentionProjections
from teacher_cache.store import CacheStore
from teacher_cache.teacher import Teacher
from teacher_cache.transform import CalibrationSample, Quantiser, as_array, calibrate

_FITTED_PER_COMPONENT = 48
"""Tokens for each component of a covariance: at this number the rotation costs held-out rows about 1% more error."""
_MEASURED_TOKENS = 8192
_MOST_ROWS, _ENOUGH_ROWS, _ENOUGH_SHARE = 384, 128, 20


def ensure_calibrated(
    store: CacheStore,
    teacher: Teacher,
    rows: Rows,
    batch_rows: int,
    projections: Mapping[int, AttentionProjections],
    note: Callable[[str], None],
) -> tuple[CacheStore, dict[str, Quantiser]]:
    """The store with a calibrated manifest, and the coding direction of each `nmse` stream by path.

    `note` is told what is going on.

    Raises:
        TeacherError: the teacher gives values that are not finite.
    """
    streams = [stream for stream in vector_streams(store.manifest) if nmse_target(stream.codec) is not None]
    if any(stream.calibration is None for stream in streams):
        records = {}
        used = sum(share_rows(store.manifest.rows, store.manifest.seq_len, store.manifest.teacher.hidden_size))
        note(f"calibrating {len(streams)} streams on the first {min(used, store.manifest.rows)} rows")
        samples = _collect(store.manifest, teacher, streams, rows, batch_rows)
        for stream in streams:
            target = nmse_target(stream.codec)
            assert target is not None
            transform, records[stream.path] = calibrate(
                samples.pop(stream.path), target, _projections(stream, projections)
            )
            note(f"  {stream.path}: NMSE {records[stream.path].nmse:.3g} on rows held out")
            store.write_constant(f"{stream.path}/basis", as_array(transform.basis_DK))
            store.write_constant(f"{stream.path}/mean", as_array(transform.mean_D))
            store.write_constant(f"{stream.path}/step", np.array(transform.step))
        store = _record(store, records)
    quantisers = {
        stream.path: Quantiser(read_transform(store.path, stream.path), _projections(stream, projections))
        for stream in streams
    }
    return store, quantisers


def _record(store: CacheStore, records: dict[str, TransformRecord]) -> CacheStore:
    manifest = replace(store.manifest, calibration=records)
    store.write_manifest(manifest)
    return CacheStore(store.path, manifest)


def _projections(stream: VectorStream, projections: Mapping[int, AttentionProjections]) -> AttentionProjections | None:
    return projections[stream.layer + 1] if stream.projected else None


def share_rows(rows: int, seq_len: int, width: int) -> tuple[int, int, int]:
    """How many of the first rows fit rotations, tune steps and check errors.

    In small stores a twentieth of the rows, or 128 if that is more: a rotation fitted on fewer tokens costs bits, not
    error, because the step is set on rows that the rotation has not seen.
    """
    measured = -(-_MEASURED_TOKENS // seq_len)
    wanted = -(-_FITTED_PER_COMPONENT * width // seq_len) + 2 * measured
    available = min(rows, wanted, _MOST_ROWS, max(_ENOUGH_ROWS, rows // _ENOUGH_SHARE))
    measured = max(1, min(measured * available // wanted, available // 4))
    return max(1, available - 2 * measured), measured, measured


@torch.inference_mode()
def _collect(
    manifest: Manifest, teacher: Teacher, streams: list[VectorStream], rows: Rows, batch_rows: int
) -> dict[str, CalibrationSample]:
    fit, tune, check = share_rows(manifest.rows, manifest.seq_len, manifest.teacher.hidden_size)
    samples = {stream.path: CalibrationSample() for stream in streams}
    views = sorted({stream.view for stream in streams})  # not those that only logits are taken from
    start = 0
    for name, count in (("fit", fit), ("tune", tune), ("check", check)):
        # a store of one or two rows has the same rows for everything
        start = min(start, manifest.rows - count)
        for first in range(start, start + count, batch_rows):
            part = rows.read(first, min(first + batch_rows, start + count))
            for one in run_views(manifest, teacher, tuple(streams), part, batch_rows, views):
                for stream in streams:
                    if stream.view == one.view:
                        _add(samples[stream.path], name, stream_values(stream, one.outputs)[one.real_BT])
        start += count
    return samples


def _add(sample: CalibrationSample, part: str, values_ND: torch.Tensor) -> None:
    if part == "fit":
        sample.fit(values_ND)
    else:
        (sample.tune if part == "tune" else sample.check).append(values_ND.float().cpu())
