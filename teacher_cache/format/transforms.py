"""What calibration found, in a store and back: rotations, steps and the projections that vectors are coded in.

Written once per group before its first block, as small arrays beside the codes; read by whoever codes more blocks or
decodes any. How they are found is in `codecs/nmse.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from teacher_cache.codecs.nmse import (
    Quantiser,
    Transform,
    as_array,
)
from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.streams import VECTORS, VectorStream
from teacher_cache.errors import StoreError
from teacher_cache.format.attention_constants import (
    ROTARY_PARTS,
    projection_constants,
    projection_path,
    rotary_constants,
    rotary_path,
)
from teacher_cache.format.layout import StoreLayout, transform_constants
from teacher_cache.format.small_arrays import read_constant, write_constant
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention import AttentionProjections, Projection, Replay
from teacher_cache.storage.base import Storage


def keep_calibration(writer: GroupWriter, found: Mapping[str, tuple[Transform, TransformRecord]]) -> GroupWriter:
    """Write what calibration found of every `nmse` stream; returns the group with a calibrated manifest."""
    for path, (transform, _) in found.items():
        write_constant(writer.storage, f"{path}/basis", as_array(transform.basis_DK))
        write_constant(writer.storage, f"{path}/mean", as_array(transform.mean_D))
        write_constant(writer.storage, f"{path}/step", np.array(transform.step))
    records = {path: record for path, (_, record) in found.items()}
    return writer.write_manifest(replace(writer.manifest, calibration=records))


def load_quantisers(
    storage: Storage, layout: StoreLayout, projections: Mapping[int, AttentionProjections]
) -> dict[str, Quantiser]:
    """The coding direction of each calibrated stream by path."""
    return {
        stream.path: Quantiser(
            read_transform(storage, stream),
            stream_projections(stream, projections),
            None if stream.calibration is None else stream.calibration.sinks,
        )
        for stream in layout.nmse_streams
    }


def stream_projections(
    stream: VectorStream, projections: Mapping[int, AttentionProjections]
) -> AttentionProjections | None:
    """The maps in whose metric a stream is coded, None where it is coded in its own."""
    return projections[stream.attention_layer] if stream.projected else None


def read_transform(storage: Storage, stream: VectorStream) -> Transform:
    """The constants of a calibrated stream of a store: what every run of its build codes with.

    Raises:
        StoreError: they are missing, damaged, or not what such a stream has.
    """
    basis, mean, step = (read_constant(storage, path, spec) for path, spec in transform_constants(stream).items())
    if stream.calibration is not None and float(step) != stream.calibration.step:
        raise StoreError(
            f"{storage.location!r} is damaged: '{stream.path}/step' is {float(step)!r} and the manifest says "
            f"{stream.calibration.step!r}. One of them would scale every number wrongly; restore both from a copy, or "
            "build the store again"
        )
    return Transform(basis_DK=torch.from_numpy(basis), mean_D=torch.from_numpy(mean), step=float(step))


def read_projections(storage: Storage, manifest: Manifest, layer: int) -> AttentionProjections:
    """The maps of a store from the input of an attention layer to its queries, keys and values, and what follows them.

    Raises:
        StoreError: they are missing, damaged, or of another teacher.
    """
    found = {
        path: torch.from_numpy(read_constant(storage, path, spec))
        for path, spec in projection_constants(manifest, layer).items()
    }
    parts = ("weight", "bias")
    maps = {name: Projection(**{part: found[projection_path(layer, name, part)] for part in parts}) for name in VECTORS}
    return AttentionProjections(**maps, replay=read_replay(storage, manifest, layer))


def read_replay(storage: Storage, manifest: Manifest, layer: int) -> Replay | None:
    """What turns the queries and keys of an attention layer after their projection; None where nothing does.

    Raises:
        StoreError: it is missing or damaged.
    """
    spec = manifest.targets.find_attention(layer)
    if spec is None or spec.replay is None:
        return None
    constants = rotary_constants(manifest, layer)
    cosine, sine = (
        torch.from_numpy(read_constant(storage, path, constants[path]))
        for path in (rotary_path(layer, part) for part in ROTARY_PARTS)
    )
    return Replay(head_width=spec.replay.head_width, cosine_Tr=cosine, sine_Tr=sine)
