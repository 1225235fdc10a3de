"""Coded arrays of a block -> tensors of some of its rows, on any device.

Pure: no disk, no state. The numbers of the columns follow `layout.py`; arrays hold one view only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.logits import TopkCodec
from teacher_cache.codecs.nmse import Transform
from teacher_cache.codecs.packing import ranges
from teacher_cache.contract.batch import (
    AttentionRelations,
    AttentionVectors,
    Places,
    SampledLogits,
    TargetBatch,
    TargetRequest,
    TopkLogits,
)
from teacher_cache.contract.streams import VectorStream
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, View
from teacher_cache.device import Arrival, CodedArray, Transfer, to_device
from teacher_cache.format.layout import DISTINCT, NEXT_KEPT, SEGMENT_STARTS, StoreLayout
from teacher_cache.format.row_bits import count_row_bits, set_positions, unpack_row_bits
from teacher_cache.models.attention import AttentionProjections, project_hidden, restarting_positions


@dataclass(frozen=True, kw_only=True)
class CodedBlock:
    """The arrays of one block that a request needs in one view: checked and decompressed, not decoded.

    Some may be on the device that decodes them, once they have arrived there.
    """

    block: int
    view: View
    request: TargetRequest
    arrays: Mapping[str, CodedArray]
    arrival: Arrival | None = None

    def sent(self, transfer: Transfer) -> CodedBlock:
        """This block on its way to a device, but for what is read on the host."""
        arrays, arrival = transfer.send(self.arrays, is_decoded_on_device)
        return replace(self, arrays=arrays, arrival=arrival)

    def count_places(self, start: int, stop: int) -> int:
        """How many real places rows start..stop have, counted from the first of the block; 0 without places."""
        if "masked/count" in self.arrays:
            return int(self.on_host("masked/count")[start:stop].sum())
        return int(count_row_bits(self.on_host(NEXT_KEPT)[start:stop]).sum()) if NEXT_KEPT in self.arrays else 0

    def on_host(self, path: str) -> NDArray[Any]:
        """An array that stays on the host."""
        values = self.arrays[path]
        assert isinstance(values, np.ndarray)
        return values


def is_decoded_on_device(path: str) -> bool:
    """Whether nothing of an array is looked at before its decoding: codes, scales, matrices, the most probable ids.

    What says which rows, positions, sinks or draws there are has to be on the host.
    """
    parts = path.split("/")
    return parts[0] in ("hidden", "attention", "logits") and not {"escapes", "sinks", "draws"}.intersection(parts)


def in_view(spec: HiddenSpec | AttentionSpec | LogitsSpec | None, view: View) -> bool:
    """Whether there is such a target, in this view."""
    return spec is not None and spec.view == view


class RowDecoder:
    """Rows start..stop of one coded block, counted from its first row, as tensors on a device."""

    def __init__(
        self,
        layout: StoreLayout,
        coded: CodedBlock,
        start: int,
        stop: int,
        *,
        device: str | torch.device,
        projections: Callable[[int], AttentionProjections],
        transforms: Callable[[str], Transform],
    ) -> None:
        self.layout = layout
        self.manifest = layout.manifest
        self.coded = coded
        self.start = start
        self.stop = stop
        self.device = device
        self.projections = projections
        self.transforms = transforms

    def decode(self) -> TargetBatch:
        """The input of the coded view and every target of the request that belongs to it."""
        if self.coded.arrival is not None:
            self.coded.arrival.await_in_current_stream()
        request, view, targets = self.coded.request, self.coded.view, self.manifest.targets
        ids_BT, places = self._host_rows("input_ids"), None
        if view == "masked":
            places = Places(
                positions_BM=self._rows("masked/positions"),
                label_ids_BM=self._rows("masked/original_ids"),
                count_B=self._rows("masked/count"),
            )
            ids_BT = self._replaced(ids_BT)
        elif NEXT_KEPT in self.coded.arrays:
            places = self._next_tokens(ids_BT)
        hidden = {
            n: self._vectors(f"hidden/{n}", rotated=n in request.rotated_layers)
            for n in request.hidden_layers
            if in_view(targets.find_hidden(n), view)
        }
        attention = {
            n: self._attention(n) for n in request.attention_layers if in_view(targets.find_attention(n), view)
        }
        streams = {n: (self.layout.stream(f"hidden/{n}"),) for n in hidden}
        return TargetBatch(
            input_ids_BT=to_device(ids_BT, self.device),
            length_B=self._rows("length"),
            row_id_B=self._rows("row_id"),
            hidden=hidden,
            attention=attention,
            places=places,
            starts_BT=self._starts(),
            logits=self._logits() if request.logits and in_view(targets.logits, view) else None,
            hidden_sinks=self._sinks_of(streams),
            attention_sinks=self._sinks_of({n: self.layout.attention[n] for n in attention}),
        )

    def _host_rows(self, path: str) -> NDArray[np.int64]:
        return self.coded.on_host(path)[self.start : self.stop].astype(np.int64)

    def _rows(self, path: str) -> torch.Tensor:
        return to_device(self._host_rows(path), self.device)

    def _bits(self, path: str) -> NDArray[np.bool_]:
        return unpack_row_bits(self.coded.on_host(path)[self.start : self.stop], self.manifest.seq_len)

    def _starts(self) -> torch.Tensor | None:
        return to_device(self._bits(SEGMENT_STARTS), self.device) if SEGMENT_STARTS in self.coded.arrays else None

    def _next_tokens(self, ids_BT: NDArray[np.int64]) -> Places:
        """The positions whose next token counts, ascending, and that token."""
        kept_BT = self._bits(NEXT_KEPT)
        positions_BM, real_BM = set_positions(kept_BT, self.manifest.places_of("plain"))
        labels_BM = np.where(real_BM, np.take_along_axis(ids_BT, positions_BM + 1, axis=1), 0)
        moved = (to_device(values, self.device) for values in (positions_BM, labels_BM, kept_BT.sum(axis=1)))
        return Places(**dict(zip(("positions_BM", "label_ids_BM", "count_B"), moved, strict=True)))

    def _replaced(self, ids_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids with the replacement ids at the real masked positions."""
        positions_BM, count_B = self._host_rows("masked/positions"), self._host_rows("masked/count")
        row, place = np.nonzero(np.arange(positions_BM.shape[1]) < count_B[:, None])
        ids_BT[row, positions_BM[row, place]] = self._host_rows("masked/replacement_ids")[row, place]
        return ids_BT

    def _coded(self, path: str) -> torch.Tensor:
        """What these rows have in a coded array."""
        return to_device(self.coded.arrays[path][self.layout.rows_of(path, self.start, self.stop)], self.device)

    def _vectors(self, path: str, *, rotated: bool = False) -> torch.Tensor:
        """Vectors [B, T, D] of a stream, or their rotated coordinates."""
        stream = self.layout.stream(path)
        assert stream.calibration is not None or not rotated, "only calibrated streams have a rotation"
        if stream.calibration is not None:
            values_ND = self._coordinates(stream)
            if not rotated:
                values_ND = self.transforms(path).synthesise(values_ND)
            if stream.calibration.sinks is not None:
                token_S, sinks_SD = self._sinks(stream)
                values_ND[token_S] = self.transforms(path).analyse(sinks_SD) if rotated else sinks_SD
        else:
            coded = {name: self._coded(one) for name, one in self.layout.coded_paths(path).items()}
            values_ND = self.layout.codecs[path].decode(coded)
        return self._by_row(values_ND)

    def _by_row(self, values_ND: torch.Tensor) -> torch.Tensor:
        return values_ND.reshape(self.stop - self.start, self.manifest.seq_len, -1)

    def _coordinates(self, stream: VectorStream) -> torch.Tensor:
        """Rotated coordinates [N, D] of a calibrated stream: codes times step."""
        assert stream.calibration is not None
        per_view = self.manifest.block_rows * self.manifest.seq_len
        start, stop = self.start * self.manifest.seq_len, self.stop * self.manifest.seq_len
        step = stream.calibration.step
        coordinates_DN = torch.empty((stream.width, stop - start), dtype=torch.float32, device=self.device)
        stored = 0
        for packing, part in ranges(stream.calibration.components):
            packed = self.coded.arrays[f"{stream.path}/codes/{packing.name}"]
            packing.unpack(packed, start, stop, step, coordinates_DN[part])
            stored = part.stop
        coordinates_DN[stored:] = 0
        index, value = (self.coded.on_host(f"{stream.path}/escapes/{name}") for name in ("index", "value"))
        component, token = np.divmod(index, per_view)
        here = (token >= start) & (token < stop)
        where = [to_device(axis[here].astype(np.int64), self.device) for axis in (component, token - start)]
        escapes = to_device(value[here].astype(np.float32), self.device)
        coordinates_DN[where[0], where[1]] = escapes * step
        return coordinates_DN.T

    def _sinks(self, stream: VectorStream) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers [S] among these rows' tokens, and vectors [S, D], of the tokens that are kept as they are."""
        index, value = (self.coded.on_host(f"{stream.path}/sinks/{name}") for name in ("index", "value"))
        start, stop = self.start * self.manifest.seq_len, self.stop * self.manifest.seq_len
        here = slice(*np.searchsorted(index, (start, stop)).tolist())
        token_S, sinks_SD = index[here].astype(np.int64) - start, value[here].astype(np.float32)
        return to_device(token_S, self.device), to_device(sinks_SD, self.device)

    def _sinks_of(self, streams: Mapping[int, tuple[VectorStream, ...]]) -> dict[int, torch.Tensor]:
        """Which tokens [B, T] are sinks of one of the streams of a layer, for the layers that can have some."""
        found = {}
        for layer, read_from in streams.items():
            if all(stream.calibration is None for stream in read_from):
                continue
            shape = (self.stop - self.start, self.manifest.seq_len)
            found[layer] = torch.zeros(shape, dtype=torch.bool, device=self.device)
            for stream in read_from:
                if stream.calibration is not None and stream.calibration.sinks is not None:
                    found[layer].view(-1)[self._sinks(stream)[0]] = True
        return found

    def _attention(self, layer: int) -> AttentionVectors | AttentionRelations:
        if (stream := self.layout.attention_input(layer)) is not None:
            # `projections` start where the coordinates end: the rotation is part of them
            coded_BTD = self._vectors(stream.path, rotated=stream.calibration is not None)
            starts_BT = self._starts()
            positions_BT = None if starts_BT is None else restarting_positions(starts_BT)
            return project_hidden(coded_BTD, self.projections(layer), positions_BT)
        streams = self.layout.attention[layer]
        if streams[0].relation_heads is not None:
            # as they are stored, in half precision and by head: so the loss reads them
            query, key, value = (self._coded(stream.path) for stream in streams)
            return AttentionRelations(query_BATT=query, key_BATT=key, value_BATT=value)
        query, key, value = (self._vectors(stream.path) for stream in streams)
        return AttentionVectors(query_BTD=query, key_BTD=key, value_BTD=value)

    def _logits(self) -> TopkLogits | SampledLogits:
        assert self.manifest.targets.logits is not None
        places = self.manifest.places_of(self.manifest.targets.logits.view)
        shape = (self.stop - self.start, places)
        codec = self.layout.logits
        if isinstance(codec, TopkCodec):
            topk = codec.decode({part.name: self._coded(f"logits/{part.name}") for part in codec.arrays()})
            return TopkLogits(
                ids_BMK=topk.ids_PK.reshape(*shape, codec.entries),
                log_probs_BMK=topk.log_probs_PK.reshape(*shape, codec.entries),
                log_tail_BM=topk.log_tail_P.reshape(shape),
            )
        assert codec is not None
        distinct_P = self.coded.on_host(DISTINCT)
        entries = {name: self.coded.on_host(path) for name, path in self.layout.draw_paths.items()}
        start, stop = self.start * places, self.stop * places
        drawn = codec.unpack(distinct_P, entries, start, stop, self.device)
        return SampledLogits(ids_BMK=drawn.ids_PK.view(*shape, -1), counts_BMK=drawn.counts_PK.view(*shape, -1))
