"""Rows of a store as codes, or as the vectors that are decoded from them: what a derivation works on.

Arrays of a block are read whole, checked and decompressed, one at a time. Only the wanted rows are kept: as codes or as
values of one view, four bytes each.

Shapes: W views, R rows, T positions, D components, N = tokens of the rows that are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.packing import VALUES_AT_ONCE, ranges
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VectorStream
from teacher_cache.format.packed_streams import Sinks
from teacher_cache.read.reader import CacheReader


@dataclass(frozen=True, kw_only=True)
class SourcePiece:
    """Rows start..stop of a block of the source, which lie from row `to` on where they are going."""

    block: int
    start: int
    stop: int
    to: int

    @property
    def target(self) -> slice:
        """The rows that they become."""
        return slice(self.to, self.to + self.stop - self.start)


def find_pieces(manifest: Manifest, first: int, last: int) -> list[SourcePiece]:
    """Where rows first..last of a store lie."""
    found = []
    for block in range(first // manifest.block_rows, -(-last // manifest.block_rows)):
        begin, end = manifest.block_range(block)
        start, stop = max(first, begin), min(last, end)
        found.append(SourcePiece(block=block, start=start - begin, stop=stop - begin, to=start - first))
    return found


class SourceRows:
    """The store that is derived from. Thread-safe."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader
        self.manifest = reader.manifest

    def padding(self, piece: SourcePiece) -> NDArray[np.bool_]:
        """[N]: True where a token of these rows is padding."""
        length_R = self.reader.load_array("length", piece.block)[piece.start : piece.stop]
        padding_RT: NDArray[np.bool_] = np.arange(self.manifest.seq_len) >= length_R[:, None]
        return padding_RT.ravel()

    def codes(
        self, stream: VectorStream, piece: SourcePiece, place_D: torch.Tensor | None = None, scale: float = 1.0
    ) -> Iterator[torch.Tensor]:
        """[D, N] codes of a calibrated stream in float32, view by view, times `scale`.

        With `place_D`, component d lies in row place_D[d].
        """
        assert stream.calibration is not None
        positions, views = self.manifest.seq_len, self.manifest.views_of(stream.view)
        start, stop = piece.start * positions, piece.stop * positions
        packed = {
            packing: self.reader.load_array(f"{stream.path}/codes/{packing.name}", piece.block)
            for packing, _ in ranges(stream.calibration.components)
        }
        escapes = self.reader.load_beside(f"{stream.path}/escapes", piece.block)
        moved_D = torch.arange(stream.width) if place_D is None else place_D
        # a few components at a time, which are still in the cache when they go where they belong
        at_once = max(1, VALUES_AT_ONCE // (stop - start))
        part_CN = torch.empty((at_once if place_D is not None else 0, stop - start))
        for view in range(views):
            codes_DN, stored = torch.empty((stream.width, stop - start)), 0
            for packing, part in ranges(stream.calibration.components):
                packed_CL, stored = np.split(packed[packing], views, axis=1)[view], part.stop
                if place_D is None:
                    packing.unpack(packed_CL, start, stop, scale, codes_DN[part])
                    continue
                for first in range(0, len(packed_CL), at_once):
                    place_C = place_D[part][first : first + at_once]
                    packing.unpack(packed_CL[first : first + at_once], start, stop, scale, part_CN[: len(place_C)])
                    codes_DN[place_C] = part_CN[: len(place_C)]
            codes_DN[moved_D[stored:]] = 0
            index_E = escapes[view]["index"].astype(np.int64)
            component_E, token_E = np.divmod(index_E, self.manifest.block_rows * positions)
            here_E = (token_E >= start) & (token_E < stop)
            values_E = torch.from_numpy(escapes[view]["value"][here_E].astype(np.float32)) * scale
            codes_DN[moved_D[torch.from_numpy(component_E[here_E])], torch.from_numpy(token_E[here_E] - start)] = (
                values_E
            )
            yield codes_DN

    def sinks(self, stream: VectorStream, piece: SourcePiece) -> list[Sinks]:
        """View by view, the tokens of a calibrated stream that are kept as they are, by number 0..N."""
        if stream.calibration is None or stream.calibration.sinks is None:
            return []
        start, stop = piece.start * self.manifest.seq_len, piece.stop * self.manifest.seq_len
        found = []
        for held in self.reader.load_beside(f"{stream.path}/sinks", piece.block):
            index_S = held["index"].astype(np.int64)
            here_S = (index_S >= start) & (index_S < stop)
            found.append(Sinks(index_S[here_S] - start, held["value"][here_S]))
        return found

    def values(self, stream: VectorStream, piece: SourcePiece) -> Iterator[torch.Tensor]:
        """[N, D] vectors of a stream in a fixed precision, view by view."""
        codec, layout = self.reader.layout.codecs[stream.path], self.reader.layout
        paths = layout.coded_paths(stream.path)
        coded = {name: self.reader.load_array(path, piece.block) for name, path in paths.items()}
        for view in range(self.manifest.views_of(stream.view)):
            first = view * self.manifest.block_rows
            parts = {}
            for name, values in coded.items():
                rows = layout.rows_of(paths[name], first + piece.start, first + piece.stop)
                parts[name] = torch.from_numpy(np.ascontiguousarray(values[rows]))
            yield codec.decode(parts)
