"""Coded arrays of a block -> tensors of some of its rows, on any device.

Pure: no disk, no state. The numbers of the columns follow `layout.py`; arrays hold one view only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.batch import (
    AttentionRelations,
    AttentionVectors,
    MaskedPositions,
    SampledLogits,
    TargetBatch,
    TargetRequest,
    TopkLogits,
)
from teacher_cache.codec import make_codec
from teacher_cache.contract import Manifest
from teacher_cache.distribution_codec import SampleTargets
from teacher_cache.layout import (
    VectorStream,
    attention_folders,
    attention_input_path,
    draw_paths,
    sample_codec,
    topk_codec,
    vector_streams,
)
from teacher_cache.packing import ranges
from teacher_cache.relations import VECTORS, AttentionProjections, project_hidden
from teacher_cache.specs import AttentionSpec, HiddenSpec, LogitsSpec, View
from teacher_cache.transform import Transform


@dataclass(frozen=True, kw_only=True)
class CodedBlock:
    """The arrays of one block that a request needs in one view: checked and decompressed, not decoded."""

    block: int
    view: View
    request: TargetRequest
    arrays: Mapping[str, NDArray[np.generic]]


def in_view(spec: HiddenSpec | AttentionSpec | LogitsSpec | None, view: View) -> bool:
    """Whether there is such a target, in this view."""
    return spec is not None and spec.view == view


class RowDecoder:
    """Rows start..stop of one coded block, counted from its first row, as tensors on a device."""

    def __init__(
        self,
        manifest: Manifest,
        coded: CodedBlock,
        start: int,
        stop: int,
        *,
        device: str | torch.device,
        projections: Callable[[int], AttentionProjections],
        transforms: Callable[[str], Transform],
    ) -> None:
        self.manifest = manifest
        self.coded = coded
        self.start = start
        self.stop = stop
        self.device = device
        self.projections = projections
        self.transforms = transforms
        self.streams = {stream.path: stream for stream in vector_streams(manifest)}

    def decode(self) -> TargetBatch:
        """The input of the coded view and every target of the request that belongs to it."""
        request, view, targets = self.coded.request, self.coded.view, self.manifest.targets
        ids_BT, masked = self._rows("input_ids"), None
        if view == "masked":
            masked = MaskedPositions(
                positions_BM=self._rows("masked/positions"),
                original_ids_BM=self._rows("masked/original_ids"),
                count_B=self._rows("masked/count"),
            )
            ids_BT = _replace(ids_BT, masked, self._rows("masked/replacement_ids"))
        hidden = {
            n: self._vectors(f"hidden/{n}", rotated=n in request.rotated_layers)
            for n in request.hidden_layers
            if in_view(targets.find_hidden(n), view)
        }
        attention = {
            n: self._attention(spec)
            for n in request.attention_layers
            if (spec := targets.find_attention(n)) is not None and spec.view == view
        }
        return TargetBatch(
            input_ids_BT=ids_BT,
            length_B=self._rows("length"),
            row_id_B=self._rows("row_id"),
            hidden=hidden,
            attention=attention,
            masked=masked,
            logits=self._logits(targets.logits) if request.logits and targets.logits and masked is not None else None,
        )

    def _rows(self, path: str) -> torch.Tensor:
        values = torch.from_numpy(self.coded.arrays[path][self.start : self.stop])
        return values.to(device=self.device, dtype=torch.int64)

    def _columns(self, path: str, per_row: int) -> torch.Tensor:
        """These rows' range of the last axis of a coded array."""
        values = self.coded.arrays[path][..., self.start * per_row : self.stop * per_row]
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _vectors(self, path: str, *, rotated: bool = False) -> torch.Tensor:
        """Vectors [B, T, D] of a stream, or their rotated coordinates."""
        stream, positions = self.streams[path], self.manifest.seq_len
        assert stream.calibration is not None or not rotated, "only calibrated streams have a rotation"
        if stream.calibration is not None:
            values_ND = self._coordinates(stream)
            if not rotated:
                values_ND = self.transforms(path).synthesise(values_ND)
        else:
            codec = make_codec(stream.codec)
            coded = {spec.name: self._columns(f"{path}/{spec.name}", positions) for spec in codec.arrays(stream.width)}
            values_ND = codec.decode(coded)
        return values_ND.reshape(self.stop - self.start, positions, -1)

    def _coordinates(self, stream: VectorStream) -> torch.Tensor:
        """Rotated coordinates [N, D] of a calibrated stream: codes times step."""
        assert stream.calibration is not None
        per_view = self.manifest.block_rows * self.manifest.seq_len
        start, stop = self.start * self.manifest.seq_len, self.stop * self.manifest.seq_len
        step, arrays = stream.calibration.step, self.coded.arrays
        coordinates_DN = torch.empty((stream.width, stop - start), dtype=torch.float32, device=self.device)
        stored = 0
        for packing, part in ranges(stream.calibration.components):
            packed = cast("NDArray[np.integer[Any]]", arrays[f"{stream.path}/codes/{packing.name}"])
            packing.unpack(packed, start, stop, step, coordinates_DN[part])
            stored = part.stop
        coordinates_DN[stored:] = 0
        index, value = (arrays[f"{stream.path}/escapes/{name}"] for name in ("index", "value"))
        component, token = np.divmod(index, per_view)
        here = (token >= start) & (token < stop)
        where = [torch.from_numpy(axis[here].astype(np.int64)).to(self.device) for axis in (component, token - start)]
        escapes = torch.from_numpy(value[here].astype(np.float32)).to(self.device)
        coordinates_DN[where[0], where[1]] = escapes * step
        return coordinates_DN.T

    def _attention(self, spec: AttentionSpec) -> AttentionVectors | AttentionRelations:
        if spec.form == "matrix":
            (folder,) = attention_folders(spec)
            matrices = (self.coded.arrays[f"{folder}/{name}"][self.start : self.stop] for name in VECTORS)
            query, key, value = (torch.from_numpy(values).to(self.device) for values in matrices)
            return AttentionRelations(query_BATT=query, key_BATT=key, value_BATT=value)
        if spec.mode == "hidden":
            stream, positions = self.streams[attention_input_path(spec)], self.manifest.seq_len
            # `projections` start where the coordinates end: the rotation is part of them
            coded_BTD = (
                self._vectors(stream.path)
                if stream.calibration is None
                else self._coordinates(stream).reshape(self.stop - self.start, positions, -1)
            )
            return project_hidden(coded_BTD, self.projections(spec.layer))
        query, key, value = (self._vectors(f"attention/{spec.layer}/{name}") for name in VECTORS)
        return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)

    def _logits(self, spec: LogitsSpec) -> TopkLogits | SampledLogits:
        places = self.manifest.masked_per_row
        shape = (self.stop - self.start, places)
        if spec.form == "sample":
            drawn = self._draws(spec, self.start * places, self.stop * places)
            return SampledLogits(ids_BMK=drawn.ids_PK.view(*shape, -1), counts_BMK=drawn.counts_PK.view(*shape, -1))
        codec = topk_codec(self.manifest, spec)
        topk = codec.decode({part.name: self._columns(f"logits/{part.name}", places) for part in codec.arrays()})
        return TopkLogits(
            ids_BMK=topk.ids_PK.reshape(*shape, spec.entries),
            log_probs_BMK=topk.log_probs_PK.reshape(*shape, spec.entries),
            log_tail_BM=topk.log_tail_P.reshape(shape),
        )

    def _draws(self, spec: LogitsSpec, start: int, stop: int) -> SampleTargets:
        """What was drawn at places start..stop of the view."""
        arrays = cast("Mapping[str, NDArray[np.uint8]]", self.coded.arrays)
        entries = {name: arrays[path] for name, path in draw_paths(self.manifest, spec).items()}
        codec = sample_codec(self.manifest, spec)
        return codec.unpack(arrays["logits/draws/distinct"], entries, start, stop, self.device)


def _replace(ids_BT: torch.Tensor, masked: MaskedPositions, replacement_ids_BM: torch.Tensor) -> torch.Tensor:
    """Put the replacement ids at the real masked positions."""
    row_B1 = torch.arange(len(ids_BT), device=ids_BT.device)[:, None]
    real_BM = masked.real_BM()
    changed_BT = ids_BT.clone()
    changed_BT[row_B1.expand_as(real_BM)[real_BM], masked.positions_BM[real_BM]] = replacement_ids_BM[real_BM]
    return changed_BT
