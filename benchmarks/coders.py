"""The codecs that `codec.py` compares, each in a store of its own, through the steps of a build and of a loader.

In: what the teacher gave for the rows, a block at a time. Out: what is decoded, float32 [R, T, D]: hidden states, or
queries, keys and values. Each step can be timed alone: `encode` (the arrays of a block in memory), `write` (compressed,
hashed, flushed), `load` (read, checked, decompressed), `unpack` (rotated coordinates in float32), `decode` (all that
comes after `load`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recorded import RecordedTeacher

from teacher_cache.build.block import compute_block
from teacher_cache.build.calibrate import ensure_calibrated
from teacher_cache.build.encode import BlockTargets
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.protocol import shard_key
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.shards import frames_to_decompress
from teacher_cache.format.transforms import load_quantisers
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.read.decode import CodedBlock
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage

Arrays = dict[str, NDArray[np.generic]]
_ROW_FIELDS = {"input_ids": "input_ids_BT", "length": "length_B", "row_id": "row_id_B", "document": "document_B"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What every codec is given: rows, what the teacher gave for them, and attention layers' projections."""

    manifest: Manifest
    recorded: RecordedTeacher
    rows: Rows
    projections: dict[int, AttentionProjections]


class StoreCoder(ABC):
    """One stream of hidden states in a store, calibrated when this is made."""

    target: str
    steps_after_loading: tuple[str, ...] = ("unpack", "decode")

    def __init__(self, source: Source, layer: int, precision: str, folder: Path) -> None:
        self.layer, self.precision, self.folder = layer, precision, folder
        self.recorded: Any = source.recorded
        [writer] = groups_to_build(LocalStorage(folder), replace(source.manifest, targets=self.targets()))
        started = time.perf_counter()
        self.writer = ensure_calibrated(writer, self.recorded, source.rows, 16, source.projections, lambda _text: None)
        self.calibrate_seconds = time.perf_counter() - started
        self.manifest = self.writer.manifest
        self.layout = self.writer.group.layout
        self.quantisers = load_quantisers(self.writer.storage, self.layout, source.projections)
        self.writer.write_metadata()
        [self.stream] = self.layout.streams
        self.arrays = [self.layout.arrays[path] for path in self.layout.arrays_in(self.stream.path)]
        self.blocks = [source.rows.read(*self.manifest.block_range(block)) for block in range(self.manifest.blocks)]

    @abstractmethod
    def targets(self) -> TargetSpecs:
        """What the store keeps."""

    @cached_property
    def reader(self) -> CacheReader:
        """The store, once it has been written."""
        return CacheReader.open(self.folder, allow_unsealed=True)

    def encode(self, block: int) -> Arrays:
        rows = self.blocks[block]
        return compute_block(self.layout, self.recorded, self.quantisers, rows, len(rows.length_B)).finish()

    def write(self, block: int, arrays: Arrays) -> None:
        self.writer.write_block(block, arrays)

    def load(self, block: int) -> CodedBlock:
        targets = self.manifest.targets
        request = TargetRequest(hidden_layers=targets.hidden_layers(), attention_layers=targets.attention_layers())
        return self.reader.load_block(block, request, "plain")

    @abstractmethod
    def decode(self, coded: CodedBlock) -> tuple[torch.Tensor, ...]:
        """Hidden states, or queries, keys and values."""

    def _rows(self, coded: CodedBlock) -> int:
        return len(self.blocks[coded.block].length_B)

    def bits(self) -> float:
        """Bits on disk per value of the hidden state."""
        return describe_store(self.folder).bits_per_value()[self.stream.path]

    def frames(self, block: int) -> Iterator[tuple[memoryview | bytearray, int]]:
        """The zstd frames that loading a block decompresses, with the bytes that each holds; without escapes."""
        for spec in self.arrays:
            if "/escapes/" not in spec.path:
                yield from frames_to_decompress(spec, self.writer.storage.read(shard_key(spec, block)))

    def codes(self) -> Iterator[NDArray[np.generic]]:
        """The components' codes in memory before packing or compression, [C, N] array after array; scales as well."""
        if self.quantisers:
            values_ND = self.recorded.hidden[self.layer].flatten(0, 1)
            quantiser = self.quantisers[self.stream.path]
            yield quantiser.quantise(values_ND, None, quantiser.find_sinks(values_ND)).numpy()
            return
        loaded = [self.load(block).arrays for block in range(self.manifest.blocks)]
        for spec in self.arrays:
            yield np.concatenate([arrays[spec.path] for arrays in loaded], axis=-1)


class HiddenCoder(StoreCoder):
    """Hidden states in one of the store's precisions."""

    target = "hidden"

    def targets(self) -> TargetSpecs:
        return TargetSpecs(hidden=(HiddenSpec(layer=self.layer, codec=self.precision),))

    def unpack(self, coded: CodedBlock) -> torch.Tensor:
        """Hidden states in rotated coordinates, if they have any."""
        if self.reader.rotation(self.layer) is not None:
            coded = replace(coded, request=replace(coded.request, rotated_layers=(self.layer,)))
        return self.reader.decode(coded, 0, self._rows(coded)).hidden[self.layer]

    def decode(self, coded: CodedBlock) -> tuple[torch.Tensor, ...]:
        return (self.reader.decode(coded, 0, self._rows(coded)).hidden[self.layer],)


class AttentionCoder(StoreCoder):
    """Hidden states kept for the queries, keys and values of the next layer alone, in their metric."""

    target = "attention"
    # from coordinates to queries, keys and values it is one step
    steps_after_loading = ("decode",)

    def targets(self) -> TargetSpecs:
        return TargetSpecs(attention=(AttentionSpec(layer=self.layer + 1, form="projected", codec=self.precision),))

    def decode(self, coded: CodedBlock) -> tuple[torch.Tensor, ...]:
        decoded = self.reader.decode(coded, 0, self._rows(coded)).attention[self.layer + 1]
        return tuple(getattr(decoded, f"{name}_BTD") for name in VECTORS)


class Fp8Coder(HiddenCoder):
    """For comparison: bytes of float8 (e4m3) and one scale per token, by torch, in the arrays of an `int8` store."""

    _LARGEST = 448.0

    def targets(self) -> TargetSpecs:
        return TargetSpecs(hidden=(HiddenSpec(layer=self.layer, codec="int8"),))

    def encode(self, block: int) -> Arrays:
        first, last = self.manifest.block_range(block)
        values_ND = self.recorded.hidden[self.layer][first:last].flatten(0, 1)
        scale_N = values_ND.abs().amax(dim=1) / self._LARGEST
        scaled_ND = values_ND / torch.where(scale_N > 0, scale_N, 1.0)[:, None]
        codes_DN = scaled_ND.to(torch.float8_e4m3fn).view(torch.int8).T.contiguous()
        targets = BlockTargets(self.layout, {})
        for name, field in _ROW_FIELDS.items():
            targets.put_rows(name, getattr(self.blocks[block], field))
        arrays = targets.finish()
        for path, coded in zip(self._paths(), (codes_DN, scale_N), strict=True):
            arrays[path][..., : len(scale_N)] = coded.numpy()
        return arrays

    def unpack(self, coded: CodedBlock) -> torch.Tensor:
        [values_BTD] = self.decode(coded)
        return values_BTD

    def decode(self, coded: CodedBlock) -> tuple[torch.Tensor, ...]:
        rows = self._rows(coded)
        codes_DN, scale_N = (
            torch.from_numpy(coded.arrays[path])[..., : rows * self.manifest.seq_len] for path in self._paths()
        )
        values_DN = codes_DN.view(torch.float8_e4m3fn).float() * scale_N
        return (values_DN.T.reshape(rows, self.manifest.seq_len, -1),)

    def _paths(self) -> tuple[str, str]:
        return f"{self.stream.path}/codes", f"{self.stream.path}/scale"
