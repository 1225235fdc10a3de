"""Blocks of a store -> the blocks of one that is derived from it: rows moved, codes kept or made coarser.

A derived block has its rows in one block of the source, or in two where the range does not start with a block. Codes of
a stream that keeps its codec are moved and not decoded, so that readers get the same bits. Where the rows of the block
are the same too, its shards are handed on byte for byte, checked against their commit. Nothing is written here. In
memory are one block as it is packed, and the codes or decoded values of one stream in one view, four bytes each.

Shapes: W views, R rows, T positions, M places, D components, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.logits import TopkCodec, TopkEntries
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.contract.streams import VectorStream
from teacher_cache.derive.origins import Derivation, StreamOrigin
from teacher_cache.derive.source_rows import SourcePiece, SourceRows, find_pieces
from teacher_cache.format.layout import NEXT_KEPT, StoreLayout
from teacher_cache.format.packed_streams import Sinks, StreamPacker
from teacher_cache.format.row_bits import count_row_bits
from teacher_cache.format.writer import BlockValues


@dataclass(frozen=True, kw_only=True)
class Coarsening:
    """Codes of one step -> codes of a larger one: `ratio` is the old step by the new one.

    Component d of the source is the derived store's component place_D[d].
    """

    place_D: torch.Tensor
    ratio: float


Coder = Coarsening | Quantiser
"""What makes the codes of a calibrated stream, from codes or from vectors."""


def cut_topk(topk: TopkEntries, entries: int) -> TopkEntries:
    """The first `entries` ids; the mass of the others joins the tail, by log-sum-exp."""
    dropped_PK = torch.cat([topk.log_tail_P[:, None], topk.log_probs_PK[:, entries:]], dim=1)
    return TopkEntries(
        ids_PK=topk.ids_PK[:, :entries],
        log_probs_PK=topk.log_probs_PK[:, :entries],
        # what was rounded may add up to a little more than there is, which a reader would take for damage
        log_tail_P=torch.logsumexp(dropped_PK.double(), dim=1).float().clamp_max(0),
    )


class BlockDeriver:
    """The blocks of a derived store. Thread-safe.

    `layout` is its own, calibrated; `coders` has, by path, those of streams that are calibrated and not kept.
    """

    def __init__(
        self, source: SourceRows, derivation: Derivation, layout: StoreLayout, coders: Mapping[str, Coder]
    ) -> None:
        self.source = source
        self.derivation = derivation
        self.layout = layout
        self.manifest = layout.manifest
        self.coders = coders

    def derive(self, block: int) -> BlockValues:
        """Every array of a block: numbers, or the bytes of a shard that is the same in the source.

        Raises:
            StoreError: the source is damaged here.
        """
        first, last = self.manifest.block_range(block)
        start = self.derivation.first
        pieces = find_pieces(self.source.manifest, start + first, start + last)
        begin, end = self.source.manifest.block_range(pieces[0].block)
        whole = (pieces[0].start, pieces[0].stop) == (0, end - begin) and len(pieces) == 1
        values: BlockValues = {}
        for path in self.layout.arrays_in("input_ids", "length", "row_id", "document", "segments", "next", "masked"):
            values[path] = self._shard(path, pieces) if whole else self._move(path, path, pieces)
        values |= self._logits(pieces, whole)
        for origin in self.derivation.origins:
            values |= self._stream(origin, pieces, whole)
        return values

    def _shard(self, path: str, pieces: list[SourcePiece]) -> bytes:
        return self.source.reader.read_shard(path, pieces[0].block)

    def _empty(self, path: str) -> NDArray[Any]:
        return np.zeros(self.layout.arrays[path].block_shape, dtype=self.layout.arrays[path].dtype)

    def _move(self, path: str, source_path: str, pieces: list[SourcePiece]) -> NDArray[Any]:
        """An array in which every row has its place, put together from what the source has of its rows."""
        target, rows = self._empty(path), self.manifest.block_rows
        for piece in pieces:
            values = self.source.reader.load_array(source_path, piece.block)
            for first in range(0, self.layout.arrays[path].views * rows, rows):
                into = self.layout.rows_of(path, first + piece.target.start, first + piece.target.stop)
                target[into] = values[self.layout.rows_of(path, first + piece.start, first + piece.stop)]
        return target

    def _stream(self, origin: StreamOrigin, pieces: list[SourcePiece], whole: bool) -> BlockValues:
        target, source = origin.target.path, origin.source.path
        # by folder name: attention/3/input may come from hidden/2
        paths = {path: source + path.removeprefix(target) for path in self.layout.arrays_in(target)}
        if origin.way == "kept" and whole:
            return {path: self._shard(before, pieces) for path, before in paths.items()}
        if target in self.manifest.calibration:
            return {**self._packed(origin, pieces)}
        if origin.way == "kept":
            return {path: self._move(path, before, pieces) for path, before in paths.items()}
        return self._recode(origin.target, origin.source, pieces)

    def _packed(self, origin: StreamOrigin, pieces: list[SourcePiece]) -> dict[str, NDArray[np.generic]]:
        """The arrays of a calibrated stream; sinks are those of the source as they are, where it has codes."""
        target = origin.target.path
        coder, packer = self.coders.get(target), StreamPacker(self.layout, self.layout.stream(target))
        for piece in pieces:
            first = piece.target.start * self.manifest.seq_len
            if isinstance(coder, Quantiser):
                padding_N = torch.from_numpy(self.source.padding(piece))
                for view, values_ND in enumerate(self.source.values(origin.source, piece)):
                    sinks_N = coder.find_sinks(values_ND, padding_N)
                    packer.put(view, first, coder.coordinates(values_ND, padding_N, sinks_N))
                    if sinks_N is not None:
                        kept = Sinks(sinks_N.numpy().nonzero()[0], coder.keep(values_ND[sinks_N]))
                        packer.put_sinks(self._placed(kept, view, piece))
                continue
            moved = () if coder is None else (coder.place_D, coder.ratio)
            for view, codes_DN in enumerate(self.source.codes(origin.source, piece, *moved)):
                packer.put(view, first, codes_DN)
            for view, one in enumerate(self.source.sinks(origin.source, piece)):
                packer.put_sinks(self._placed(one, view, piece))
        return packer.finish()

    def _placed(self, sinks: Sinks, view: int, piece: SourcePiece) -> Sinks:
        """Sinks among the rows of a piece -> the same ones in the block that is made of it."""
        first = view * self.manifest.block_rows + piece.target.start
        return Sinks(sinks.token_S + first * self.manifest.seq_len, sinks.value_SD)

    def _recode(self, stream: VectorStream, source: VectorStream, pieces: list[SourcePiece]) -> BlockValues:
        """A stream in another fixed precision; padding is zeros and stays so."""
        codec = self.layout.codecs[stream.path]
        paths = self.layout.coded_paths(stream.path)
        coded = {path: self._empty(path) for path in paths.values()}
        for piece in pieces:
            for view, values_ND in enumerate(self.source.values(source, piece)):
                first = view * self.manifest.block_rows
                for name, values in codec.encode(values_ND).items():
                    into = self.layout.rows_of(paths[name], first + piece.target.start, first + piece.target.stop)
                    coded[paths[name]][into] = values
        return {**coded}

    def _logits(self, pieces: list[SourcePiece], whole: bool) -> BlockValues:
        codec, decoder = self.layout.logits, self.source.reader.layout.logits
        if isinstance(codec, TopkCodec) and isinstance(decoder, TopkCodec) and codec != decoder:
            return self._cut_logits(codec, decoder, pieces)
        paths = self.layout.arrays_in("logits")
        if whole:
            return {path: self._shard(path, pieces) for path in paths}
        ragged = self.layout.draw_paths.values()
        return {
            path: self._move_draws(path, pieces) if path in ragged else self._move(path, path, pieces) for path in paths
        }

    @property
    def _places(self) -> int:
        """M: places of a row that can have a distribution."""
        spec = self.manifest.targets.logits
        return 0 if spec is None else self.manifest.places_of(spec.view)

    def _move_draws(self, path: str, pieces: list[SourcePiece]) -> NDArray[Any]:
        """An array [W, room] of what lies place after place, as many entries each as `distinct` says."""
        target, places = self._empty(path), self._places
        held_W = np.zeros(len(target), dtype=np.int64)
        for piece in pieces:
            entries = self.source.reader.load_array(path, piece.block)
            distinct = self.source.reader.load_distinct(piece.block).reshape(len(target), -1)
            for view, distinct_P in enumerate(distinct):
                first = int(distinct_P[: piece.start * places].sum(dtype=np.int64))
                size = int(distinct_P[piece.start * places : piece.stop * places].sum(dtype=np.int64))
                target[view, held_W[view] : held_W[view] + size] = entries[view, first : first + size]
                held_W[view] += size
        return target

    def _cut_logits(self, codec: TopkCodec, decoder: TopkCodec, pieces: list[SourcePiece]) -> BlockValues:
        """Fewer ids, or log-probabilities in another codec. Places that are not kept stay zeros."""
        coded = {one.name: self._empty(f"logits/{one.name}") for one in codec.arrays()}
        rows, places = self.manifest.block_rows, self._places
        for piece in pieces:
            load = self.source.reader.load_array
            if NEXT_KEPT in self.layout.arrays:
                count_W = count_row_bits(load(NEXT_KEPT, piece.block))
            else:
                count_W = load("masked/count", piece.block)
            count_WR = count_W.reshape(-1, rows)[:, piece.start : piece.stop]
            view_E, row_E, place_E = np.nonzero(np.arange(places) < count_WR[:, :, None])
            from_E = (view_E * rows + row_E + piece.start) * places + place_E
            to_E = (view_E * rows + row_E + piece.to) * places + place_E
            held = {one.name: load(f"logits/{one.name}", piece.block)[..., from_E] for one in decoder.arrays()}
            topk = cut_topk(decoder.decode({name: torch.from_numpy(one) for name, one in held.items()}), codec.entries)
            for name, values in codec.encode(topk).items():
                coded[name][..., to_E] = values
        return {f"logits/{name}": values for name, values in coded.items()}
