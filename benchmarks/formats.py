"""The formats for hidden states on disk that `layout.py` compares: this store, and the usual alternatives.

Each format takes the rows block by block and gives batches of rows back: hidden states [B, T, D] of each layer and the
token ids that belong to them. It does so in two steps: loaded data is in memory, checked and decompressed; decoded data
is float32 and contiguous. All formats but this store keep float16, uncompressed unless the name says otherwise. One row
of T tokens is one sample. When it loads, this store checks the SHA-256 of every shard. The others check nothing by
default (HDF5 chunks and Parquet pages can carry checksums on request).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from recorded import RecordedTeacher
from safetensors.torch import load_file, save_file

from teacher_cache.build.block import compute_block
from teacher_cache.build.calibrate import ensure_calibrated
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.transforms import load_quantisers
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage

try:
    import h5py
except ImportError as error:
    raise SystemExit(
        "h5py is not installed, and HDF5 is one of the formats compared: pip install -e '.[benchmarks]'"
    ) from error

IDS = "input_ids"
Samples = dict[str, torch.Tensor]
"""Rows of one batch: `input_ids` [B, T] and `hidden.<layer>` [B, T, D] by name."""
Write = Callable[[int, Samples], None]
"""Takes the number of a block's first row, and the block."""
Load = Callable[[Sequence[int]], Callable[[], Samples]]
"""Loads rows by number; what it returns decodes them."""


class Format(Protocol):
    """One way to keep samples in a folder."""

    name: str
    precision: str
    by_block: bool
    """Rows are shuffled by whole blocks, not one by one."""

    def writer(self, folder: Path) -> AbstractContextManager[Write]:
        """Write to an empty folder, whole on leaving the context. Entering does what is done once per corpus."""

    def reader(self, folder: Path) -> AbstractContextManager[Load]:
        """Read what was written."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the formats that have no manifest of their own know of the samples: names and shapes of one row each."""

    of_row: dict[str, tuple[int, ...]]
    block_rows: int

    def empty(self, rows: int) -> Samples:
        """Room for so many rows as they are stored."""
        dtypes = {name: torch.int32 if name == IDS else torch.float16 for name in self.of_row}
        return {name: torch.empty(rows, *shape, dtype=dtypes[name]) for name, shape in self.of_row.items()}


class StoreFormat:
    """A store of this project: blocks written as a build does and read as the loader does.

    What a build adds once, the teacher's own files and the seal, is left out: no other format has them.
    """

    by_block = True

    def __init__(self, manifest: Manifest, precision: str, recorded: RecordedTeacher, rows: Rows) -> None:
        self.name, self.precision = f"this store, {precision}", precision
        self.manifest, self.recorded, self.rows = manifest, recorded, rows

    @contextmanager
    def writer(self, folder: Path) -> Iterator[Write]:
        [group] = groups_to_build(LocalStorage(folder), self.manifest)
        teacher: Any = self.recorded
        group = ensure_calibrated(group, teacher, self.rows, 16, {}, lambda _text: None)
        layout = group.group.layout
        quantisers = load_quantisers(group.storage, layout, {})
        group.write_metadata()

        def write(first: int, samples: Samples) -> None:
            # the values of `samples`, as a build gets them
            part = self.rows.read(first, first + len(samples[IDS]))
            targets = compute_block(layout, teacher, quantisers, part, len(samples[IDS]))
            group.write_block(first // self.manifest.block_rows, targets.finish())

        yield write

    @contextmanager
    def reader(self, folder: Path) -> Iterator[Load]:
        reader = CacheReader.open(folder, allow_unsealed=True)
        request = TargetRequest(hidden_layers=tuple(self.recorded.hidden))

        def load(rows: Sequence[int]) -> Callable[[], Samples]:
            coded = reader.load_block(rows[0] // self.manifest.block_rows, request, "plain")

            def decode() -> Samples:
                batch = reader.decode(coded, 0, len(rows))
                # a decoded tensor may be a transposed view; the other formats give their rows in order
                hidden = {f"hidden.{layer}": values.contiguous() for layer, values in batch.hidden.items()}
                return {IDS: batch.input_ids_BT, **hidden}

            return decode

        yield load


class FilePerRow:
    """One file for each row, by functions that save and read a dictionary of tensors."""

    precision, by_block = "float16", False

    def __init__(
        self, name: str, shapes: Shapes, save: Callable[[Samples, Path], None], read: Callable[[Path], Samples]
    ) -> None:
        self.name, self.shapes, self.save, self.read = name, shapes, save, read

    @contextmanager
    def writer(self, folder: Path) -> Iterator[Write]:
        def write(first: int, samples: Samples) -> None:
            stored = as_stored(samples)
            for row in range(len(stored[IDS])):
                # clones: a slice would be saved with all of the block behind it
                self.save({name: values[row].clone() for name, values in stored.items()}, folder / f"{first + row:08d}")

        yield write

    @contextmanager
    def reader(self, folder: Path) -> Iterator[Load]:
        def load(rows: Sequence[int]) -> Callable[[], Samples]:
            samples = self.shapes.empty(len(rows))
            for place, row in enumerate(rows):
                for name, values in self.read(folder / f"{row:08d}").items():
                    samples[name][place] = values
            return partial(as_float, samples)

        yield load


def safetensors_per_row(name: str, shapes: Shapes) -> FilePerRow:
    return FilePerRow(name, shapes, save_file, load_file)


def pt_per_row(name: str, shapes: Shapes) -> FilePerRow:
    return FilePerRow(name, shapes, torch.save, lambda path: torch.load(path, weights_only=True))


class Hdf5:
    """One HDF5 file, one dataset for each layer, one chunk for each row."""

    precision, by_block = "float16", False

    def __init__(self, name: str, shapes: Shapes, rows: int, **filters: Any) -> None:
        self.name, self.shapes, self.rows, self.filters = name, shapes, rows, filters

    @contextmanager
    def writer(self, folder: Path) -> Iterator[Write]:
        with h5py.File(folder / "rows.h5", "w") as file:
            for name, shape in self.shapes.of_row.items():
                dtype = "int32" if name == IDS else "float16"
                file.create_dataset(name, (self.rows, *shape), dtype, chunks=(1, *shape), **self.filters)

            def write(first: int, samples: Samples) -> None:
                for name, values in as_stored(samples).items():
                    file[name][first : first + len(values)] = values.numpy()

            yield write

    @contextmanager
    def reader(self, folder: Path) -> Iterator[Load]:
        # no cache of decompressed chunks: in an epoch no row is read twice, and small runs would be measured wrong
        with h5py.File(folder / "rows.h5", "r", rdcc_nbytes=0) as file:
            datasets = {name: file[name] for name in self.shapes.of_row}

            def load(rows: Sequence[int]) -> Callable[[], Samples]:
                samples = self.shapes.empty(len(rows))
                for place, (first, last) in spans(rows):
                    for name, dataset in datasets.items():
                        samples[name][place : place + last - first] = torch.from_numpy(dataset[first:last])
                return partial(as_float, samples)

            yield load


class Parquet:
    """One Parquet file, zstd, one column for each layer with a row's values as bytes of fixed size.

    Lists of half floats say more about themselves, and read five times slower (pyarrow 26).
    """

    precision = "float16"

    def __init__(self, name: str, shapes: Shapes, rows_per_group: int) -> None:
        self.name, self.shapes, self.rows_per_group = name, shapes, rows_per_group
        self.by_block = rows_per_group == shapes.block_rows
        sizes = {name: int(np.prod(shape)) * (4 if name == IDS else 2) for name, shape in shapes.of_row.items()}
        self.schema = pa.schema([(name, pa.binary(size)) for name, size in sizes.items()])

    @contextmanager
    def writer(self, folder: Path) -> Iterator[Write]:
        # dictionaries and minima of such values help nobody
        options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
        with parquet.ParquetWriter(folder / "rows.parquet", self.schema, **options) as file:

            def write(_first: int, samples: Samples) -> None:
                columns = [
                    pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(values.numpy())])
                    for field, values in zip(self.schema, as_stored(samples).values(), strict=True)
                ]
                file.write_table(pa.Table.from_arrays(columns, schema=self.schema), self.rows_per_group)

            yield write

    @contextmanager
    def reader(self, folder: Path) -> Iterator[Load]:
        with parquet.ParquetFile(folder / "rows.parquet") as file:

            def load(rows: Sequence[int]) -> Callable[[], Samples]:
                # either a row is a group, or the rows are one group
                groups = [rows[0] // self.rows_per_group] if self.by_block else list(rows)
                table, samples = file.read_row_groups(groups, use_threads=False), self.shapes.empty(len(rows))
                for name, shape in self.shapes.of_row.items():
                    place = 0
                    for chunk in table[name].chunks:
                        width, dtype = chunk.type.byte_width, np.int32 if name == IDS else np.float16
                        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
                        samples[name][place : place + len(chunk)] = torch.from_numpy(
                            values.view(dtype).reshape(-1, *shape)
                        )
                        place += len(chunk)
                return partial(as_float, samples)

            yield load


def as_stored(samples: Samples) -> Samples:
    """Token ids in int32 and hidden states in float16: what every format but this store keeps."""
    return {name: values.int() if name == IDS else values.half() for name, values in samples.items()}


def as_float(samples: Samples) -> Samples:
    """Token ids in int64 and hidden states in float32: what training takes."""
    return {name: values.long() if name == IDS else values.float() for name, values in samples.items()}


def spans(rows: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Runs of consecutive row numbers: the place of each in `rows`, its first row and the row after its last."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield start, (rows[start], rows[place - 1] + 1)
            start = place
