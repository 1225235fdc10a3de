"""Raw teacher outputs -> the arrays of one block.

`BlockTargets` collects what the passes over a block give, batch by batch and view by view, already coded, so that a
block costs memory for its coded form only. Logits exist for a bounded number of positions at a time. Padding is written
as zeros: it is excluded from every loss, and what a teacher computes there would only cost space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.build.passes import TeacherPass
from teacher_cache.codecs.logits import SampleCodec, TopkCodec, TopkEntries
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.codecs.sparse_logits import draw_samples, sample_points, topk_log_probabilities
from teacher_cache.contract.streams import VectorStream
from teacher_cache.device import to_device, to_host
from teacher_cache.format.layout import DISTINCT, StoreLayout
from teacher_cache.format.packed_streams import Sinks, StreamPacker
from teacher_cache.teacher.outputs import stream_values

_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Logits held at a time (64 MiB and 1 GiB in float32): on the CPU 67 positions of a 250,002-id vocabulary."""


class BlockTargets:
    """The arrays of one block, filled batch by batch.

    `quantisers` has the coding direction of every `nmse` stream by path. Drawn ids are collected four bytes each, and
    packed by `finish`, which needs no teacher and may run in another thread.
    """

    def __init__(self, layout: StoreLayout, quantisers: Mapping[str, Quantiser]) -> None:
        self.layout = layout
        self.manifest = layout.manifest
        self.quantisers = quantisers
        packed_later = {*layout.draw_paths.values(), *layout.arrays_in(*(one.path for one in layout.nmse_streams))}
        self.arrays: dict[str, NDArray[np.generic]] = {
            path: np.zeros(spec.block_shape, dtype=spec.dtype)
            for path, spec in layout.arrays.items()
            if path not in packed_later
        }
        self._packers = {stream.path: StreamPacker(layout, stream) for stream in layout.nmse_streams}
        self._draws: NDArray[np.int32] | None = None
        if isinstance(layout.logits, SampleCodec):
            places = layout.arrays[DISTINCT].block_shape[0]
            self._draws = np.full((places, layout.logits.draws), -1, dtype=np.int32)

    def put_rows(self, path: str, values: NDArray[np.generic], first: int = 0) -> None:
        """Store per-row values, such as token ids, from row `first` on, unless an earlier group holds them."""
        if path in self.arrays:
            self.arrays[path][first : first + len(values)] = values

    def put_vectors(self, one: TeacherPass) -> None:
        """Code the hidden states and attention vectors of a pass."""
        first = one.masked_view * self.manifest.block_rows + one.first
        for stream in self.layout.streams:
            if stream.view != one.view:
                continue
            # relations are T times as large as the vectors they come from: row by row
            at_once = len(one.real_BT) if stream.relation_heads is None else 1
            for start in range(0, len(one.real_BT), at_once):
                rows = slice(start, start + at_once)
                values_BTD = stream_values(stream, one.outputs, one.real_BT, rows)
                self._put_stream(stream, first + start, values_BTD, ~one.real_BT[rows])

    def _put_stream(self, stream: VectorStream, first: int, values_BTD: torch.Tensor, padding_BT: torch.Tensor) -> None:
        if (packer := self._packers.get(stream.path)) is not None:
            quantiser = self.quantisers[stream.path]
            given_NH, padding_N = values_BTD.flatten(0, 1), padding_BT.flatten()
            sinks_N = quantiser.find_sinks(given_NH, padding_N)
            view, row = divmod(first, self.manifest.block_rows)
            start = row * self.manifest.seq_len
            packer.put(view, start, quantiser.coordinates(given_NH, padding_N, sinks_N))
            if sinks_N is not None and bool(sinks_N.any()):
                token_S = first * self.manifest.seq_len + to_host(sinks_N.nonzero()[:, 0])
                packer.put_sinks(Sinks(token_S, quantiser.keep(given_NH[sinks_N])))
            return
        values_ND = values_BTD.masked_fill(padding_BT[:, :, None], 0).flatten(0, 1)
        paths = self.layout.coded_paths(stream.path)
        for name, values in self.layout.codecs[stream.path].encode(values_ND).items():
            rows = self.layout.rows_of(paths[name], first, first + len(values_BTD))
            self.arrays[paths[name]][rows] = values

    def put_logits(
        self,
        masked_view: int,
        first: int,
        row_id_B: NDArray[np.int64],
        positions_BM: torch.Tensor,
        real_BM: torch.Tensor,
        final_BTD: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Code the distribution at the places of rows `first`, …, a bounded number of them at a time.

        Only real places go through the head; `positions_BM` and `real_BM` are on the host, and may have more columns
        than a row has places where none of those is real. `row_id_B` are the rows' numbers in the corpus, which decide
        what is drawn.
        """
        spec, codec = self.manifest.targets.logits, self.layout.logits
        assert spec is not None
        places = self.manifest.places_of(spec.view)
        start = (masked_view * self.manifest.block_rows + first) * places
        rows_P, ranks_P = real_BM.nonzero(as_tuple=True)
        if not len(rows_P):
            return
        places_P = rows_P * places + ranks_P
        from_P = rows_P * final_BTD.shape[1] + positions_BM[rows_P, ranks_P]
        final_PD = final_BTD.flatten(0, 1)[to_device(from_P, final_BTD.device)]
        at_once = max(1, _LOGITS_AT_ONCE.get(final_PD.device.type, 2**28) // self.manifest.teacher.vocab_size)
        chunks = max(1, -(-len(places_P) // at_once))
        for chunk_P, chunk_PD in zip(places_P.tensor_split(chunks), final_PD.tensor_split(chunks), strict=True):
            logits_PV, place_P = head(chunk_PD), chunk_P.numpy()
            if isinstance(codec, TopkCodec):
                topk = topk_log_probabilities(logits_PV, codec.entries, self.manifest.temperature)
                self.put_topk(start + place_P, topk)
            elif self._draws is not None:
                row_P, within_P = np.divmod(place_P, places)
                points_PN = sample_points(
                    self.manifest.seed, row_id_B[row_P], masked_view, within_P, self._draws.shape[1]
                )
                self._draws[start + place_P] = draw_samples(logits_PV, points_PN, self.manifest.temperature)

    def put_topk(self, columns: NDArray[np.int64], topk: TopkEntries) -> None:
        """Code the most probable ids at P places of the block; `columns` are the numbers of these places."""
        assert isinstance(self.layout.logits, TopkCodec)
        for name, values in self.layout.logits.encode(topk).items():
            self.arrays[f"logits/{name}"][..., columns] = values

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Pack what is still unpacked; returns every array of the block. Call once.

        Raises:
            TeacherError: more values are beyond their packing, or more tokens are sinks, than there is room for.
        """
        for packer in self._packers.values():
            self.arrays |= packer.finish()
        self._packers.clear()
        if isinstance(self.layout.logits, SampleCodec) and self._draws is not None:
            self._pack_draws(self.layout.logits, self._draws)
            self._draws = None
        return self.arrays

    def _pack_draws(self, codec: SampleCodec, ids_PN: NDArray[np.int32]) -> None:
        paths, views = self.layout.draw_paths, self.layout.arrays[DISTINCT].views
        for path in paths.values():
            self.arrays[path] = np.zeros(self.layout.arrays[path].block_shape, dtype=np.uint8)
        distinct_WP = self.arrays[DISTINCT].reshape(views, -1)
        for view, ids in enumerate(np.split(ids_PN, views)):
            packed = codec.pack(ids)
            distinct_WP[view] = packed.distinct_P
            for name, values in packed.entries.items():
                self.arrays[paths[name]][view, : len(values)] = values
