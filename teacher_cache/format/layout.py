"""Where everything lies in a store: the zarr arrays that a manifest implies, their shapes, chunks and names.

Every array has one axis of blocks in front and one shard per block, so that a block is written, checked, repaired and
read by whole files. R rows a block, T positions, M places, K kept entries, W views of a kind, N =
W * R * T tokens (token ((w * R) + r) * T + t is position t of row r in view w), P = W * R * M places (likewise).

    input_ids            [blocks, R, T]    int32      rows as packed, padded
    length, row_id, document  [blocks, R]             real positions; number in the corpus; number of its first document
    segments/starts      [blocks, R, ceil(T/8)]  uint8  bit t: a segment begins at position t; where they are isolated
    next/kept            [blocks, R, ceil(T/8)]  uint8  bit t: what follows position t is kept; of causal teachers
    masked/positions, masked/original_ids, masked/replacement_ids  [blocks, W*R, M],  masked/count  [blocks, W*R]
    logits/ids/{low,middle,high}  [blocks, K, P]  uint8  bytes of the ids, most probable first: as many as V needs
    logits/log_probs     [blocks, K, P]               as coded by `codecs/logits.py`
    logits/log_tail      [blocks, P]       float16    log of the mass outside the K ids
    hidden/<l>/…         [blocks, D, N]               as coded by the vector codec
    attention/<l>/{input,replayed}/…, attention/<l>/{query,key,value}/…  likewise

Instead of the most probable ids, logits may hold K drawn ones, as `SampleCodec` packs them, E = R * M * K rounded up:

    logits/draws/distinct              [blocks, P]     uint8  how many distinct ids a place has
    logits/draws/ids/{low,middle,high}, logits/draws/counts  [blocks, W, E]  uint8  place after place

With `--relations matrix`, relations in A heads are kept instead of vectors, row w * R + r being row r in view w:

    attention/<l>/relations/{query,key,value}  [blocks, W*R, A, T, T]  float16

In an `nmse` codec a stream of vectors has, once it is calibrated, and with n = R * T tokens a view, `packing.py`:

    …/codes/<packing>    [blocks, D', W * length(n)]  the D' components of that packing
    …/escapes/count      [blocks, W]       int32      how many values of a view are beyond their packing
    …/escapes/index      [blocks, W, E]    int32      component * n + token (int64 where that is beyond 32 bits)
    …/escapes/value      [blocks, W, E]    int16
    …/basis, …/mean, …/step                           constants: x = mean + step * basis @ codes

and, where a few tokens would own the variance (`codecs/sinks.py`), S of them at most a view:

    …/sinks/count        [blocks, W]       int32      how many tokens of a view are kept as they are
    …/sinks/index        [blocks, W, S]    int32      their numbers within the view (int64 where that is beyond 32 bits)
    …/sinks/value        [blocks, W, S, D] float16    their vectors x (float32 where those are too large)

In such a codec, attention that is computed from a hidden state of its own lies in attention/<l>/projected/…, where x is
its queries, keys and values side by side. So is x in attention/<l>/replayed/…, before positions turn queries and keys:

    attention/<l>/projection/{query,key,value}/{weight,bias}   constants: from what is kept to the three
    attention/<l>/rotary/{cosine,sine}  [T, r]                 constants: by position, where there are some to replay

`StoreLayout.of` works all of this out from a manifest, once. Nothing here touches a disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import Self

from teacher_cache.codecs.base import CodedArraySpec, VectorCodec
from teacher_cache.codecs.fixed import make_codec
from teacher_cache.codecs.logits import SampleCodec, TopkCodec
from teacher_cache.codecs.packing import ranges
from teacher_cache.codecs.relations import RelationCodec
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VectorStream, attention_streams, vector_streams
from teacher_cache.format.arrays import ArraySpec, ConstantSpec, coded_array, coded_path, ragged_array, whole_array
from teacher_cache.format.attention_constants import projection_constants, rotary_constants
from teacher_cache.format.row_bits import row_bytes

_ROW_ARRAYS = (("length", "int32"), ("row_id", "int64"), ("document", "int64"))
"""Arrays of one number per row, with their types."""
_ESCAPES_PER_CHUNK = 2**14
_VALUES_PER_ESCAPE = 16
_SINKS_PER_SEEN, _SINKS_UNSEEN = 4, 1 / 64
"""Room for sinks: four times their share in the calibration sample, and a token in 64 whatever that was."""
_SINKS_LEAST = 64
"""Room for sinks in the smallest block: a share says little of a few rows, which may have several of them each."""
_SINK_NUMBERS_PER_CHUNK = 2**17
_DRAWS_PER_CHUNK = 2**15
_DRAWS = "logits/draws"
SEGMENT_STARTS = "segments/starts"
NEXT_KEPT = "next/kept"
DISTINCT = f"{_DRAWS}/distinct"
"""How many distinct ids each place has, where drawn ids are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreLayout:
    """All that a manifest implies about what lies where: worked out once, by `of`, and held by whoever needs it.

    `streams` are the streams of vectors that are stored; `attention` has those that each attention layer is read from.
    `codecs` are those of streams in a fixed precision, by the stream's path (streams in an `nmse` codec have
    transforms), and `logits` is the codec of the output distribution. `arrays` are written
    block by block, by path; of an `nmse` stream there are none before it is calibrated. `constants` are the arrays that
    are not cut into blocks, by path.
    """

    manifest: Manifest
    streams: tuple[VectorStream, ...]
    attention: Mapping[int, tuple[VectorStream, ...]]
    codecs: Mapping[str, VectorCodec]
    logits: TopkCodec | SampleCodec | None
    arrays: Mapping[str, ArraySpec]
    constants: Mapping[str, ConstantSpec]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The layout of the store, or of the group of one, that this manifest describes."""
        streams, attention = vector_streams(manifest), attention_streams(manifest)
        codecs = {stream.path: _vector_codec(stream) for stream in streams if stream.target_nmse is None}
        logits = _logits_codec(manifest)
        arrays = [*_input_arrays(manifest), *_logits_arrays(manifest, logits)]
        for stream in streams:
            arrays += _stream_arrays(manifest, stream, codecs.get(stream.path))
        return cls(
            manifest=manifest,
            streams=streams,
            attention=attention,
            codecs=codecs,
            logits=logits,
            arrays={spec.path: spec for spec in arrays},
            constants=_constants(manifest, streams, attention),
        )

    def stream(self, path: str) -> VectorStream:
        """The stream that lies under `path`."""
        return self._streams_by_path[path]

    @cached_property
    def _streams_by_path(self) -> dict[str, VectorStream]:
        return {stream.path: stream for stream in self.streams}

    def attention_input(self, layer: int) -> VectorStream | None:
        """What the attention of a layer is computed from; None where its own vectors are stored."""
        return _attention_input(self.attention[layer])

    @cached_property
    def nmse_streams(self) -> tuple[VectorStream, ...]:
        """The streams in an `nmse` codec."""
        return tuple(stream for stream in self.streams if stream.target_nmse is not None)

    @cached_property
    def uncalibrated(self) -> tuple[VectorStream, ...]:
        """The streams that must be calibrated before a block can be written."""
        return tuple(stream for stream in self.nmse_streams if stream.calibration is None)

    @cached_property
    def draw_paths(self) -> dict[str, str]:
        """Where each array of one byte a drawn id lies, by its codec's name for it; empty where no ids are drawn."""
        return _draw_paths(self.logits) if isinstance(self.logits, SampleCodec) else {}

    def coded_paths(self, stream: str) -> dict[str, str]:
        """Where each array of a stream in a fixed precision lies, by its codec's name for it."""
        specs = self.codecs[stream].arrays(self.stream(stream).width)
        return {spec.name: coded_path(stream, spec) for spec in specs}

    def arrays_in(self, *folders: str) -> list[str]:
        """The paths of the arrays that are one of these folders or lie below one, in the order of `arrays`."""
        inside = tuple(f"{folder}/" for folder in folders)
        return [path for path in self.arrays if f"{path}/".startswith(inside)]

    def rows_of(self, path: str, start: int, stop: int) -> tuple[slice | EllipsisType, ...]:
        """Where rows start..stop lie in a block of an array, row w * R + r being row r of view w.

        Rows are along the first axis, or their tokens or places are along the last. Packed codes and ragged arrays have
        no such places.
        """
        spec = self.arrays[path]
        if spec.view_axis != -1:
            return (slice(start, stop),)
        per_row = spec.block_shape[-1] // (spec.views * self.manifest.block_rows)
        return ..., slice(start * per_row, stop * per_row)


def _vector_codec(stream: VectorStream) -> VectorCodec:
    return make_codec(stream.codec) if stream.relation_heads is None else RelationCodec(stream.relation_heads)


def _attention_input(read_from: tuple[VectorStream, ...]) -> VectorStream | None:
    return read_from[0] if read_from[0].makes_attention else None


def transform_constants(stream: VectorStream) -> dict[str, ConstantSpec]:
    """What calibration finds of an `nmse` stream: D numbers of a token are made of as many as the stream is wide."""
    size = stream.coded_width
    return {
        f"{stream.path}/basis": ConstantSpec(dtype="float32", shape=(size, stream.width)),
        f"{stream.path}/mean": ConstantSpec(dtype="float32", shape=(size,)),
        f"{stream.path}/step": ConstantSpec(dtype="float64", shape=(), positive=True),
    }


def variance_constant(layer: int) -> tuple[str, ConstantSpec]:
    """Where the total variance of a hidden state lies."""
    return f"hidden/{layer}/variance", ConstantSpec(dtype="float64", shape=(), positive=True)


def _constants(
    manifest: Manifest, streams: tuple[VectorStream, ...], attention: Mapping[int, tuple[VectorStream, ...]]
) -> dict[str, ConstantSpec]:
    found: dict[str, ConstantSpec] = {}
    for stream in streams:
        found |= transform_constants(stream) if stream.target_nmse is not None else {}
    found |= map(variance_constant, manifest.targets.hidden_layers())
    for layer, read_from in attention.items():
        if _attention_input(read_from) is not None:
            found |= projection_constants(manifest, layer) | rotary_constants(manifest, layer)
    return found


def _input_arrays(manifest: Manifest) -> list[ArraySpec]:
    """The rows and their masks, unless an earlier group holds them."""
    rows, positions = manifest.block_rows, manifest.seq_len
    arrays = []
    if not manifest.inputs_held:
        arrays = [whole_array("input_ids", "int32", rows, positions)]
        arrays += [whole_array(name, dtype, rows) for name, dtype in _ROW_ARRAYS]
        said_of_positions = {SEGMENT_STARTS: manifest.segments == "isolated", NEXT_KEPT: manifest.positions is not None}
        arrays += [
            whole_array(path, "uint8", rows, row_bytes(positions)) for path, said in said_of_positions.items() if said
        ]
    if "masked" in manifest.targets.views() and "masked" not in manifest.inputs_held:
        views, places = manifest.views, manifest.masked_per_row
        arrays += [
            whole_array(f"masked/{name}", "int32", views * rows, places, views=views)
            for name in ("positions", "original_ids", "replacement_ids")
        ]
        arrays.append(whole_array("masked/count", "int32", views * rows, views=views))
    return arrays


def _logits_codec(manifest: Manifest) -> TopkCodec | SampleCodec | None:
    spec, vocab_size = manifest.targets.logits, manifest.teacher.vocab_size
    if spec is None:
        return None
    if spec.form == "sample":
        return SampleCodec(draws=spec.entries, vocab_size=vocab_size)
    return TopkCodec(entries=spec.entries, vocab_size=vocab_size, log_probs=spec.codec)


def _draw_paths(codec: SampleCodec) -> dict[str, str]:
    return {name: f"{_DRAWS}/{name}" for name in codec.entry_names()}


def _logits_arrays(manifest: Manifest, codec: TopkCodec | SampleCodec | None) -> list[ArraySpec]:
    spec = manifest.targets.logits
    if codec is None or spec is None:
        return []
    views, places = manifest.views_of(spec.view), manifest.block_rows * manifest.places_of(spec.view)
    if isinstance(codec, TopkCodec):
        return [coded_array("logits", array, views, places) for array in codec.arrays()]
    distinct = CodedArraySpec(name=DISTINCT.rpartition("/")[2], dtype="uint8", components=None)
    chunks = -(-places * codec.draws // _DRAWS_PER_CHUNK)
    return [
        coded_array(_DRAWS, distinct, views, places),
        *(
            ragged_array(path, "uint8", views, chunks, _DRAWS_PER_CHUNK, counted_by=DISTINCT)
            for path in _draw_paths(codec).values()
        ),
    ]


def _stream_arrays(manifest: Manifest, stream: VectorStream, codec: VectorCodec | None) -> list[ArraySpec]:
    views, rows = manifest.views_of(stream.view), manifest.block_rows
    if codec is None:
        return _packed_arrays(stream, views, rows * manifest.seq_len)
    return [coded_array(stream.path, spec, views, rows * manifest.seq_len) for spec in codec.arrays(stream.width)]


def _packed_arrays(stream: VectorStream, views: int, tokens: int) -> list[ArraySpec]:
    """The arrays of an `nmse` stream; none before it is calibrated."""
    if stream.calibration is None:
        return []
    arrays = []
    for packing, part in ranges(stream.calibration.components):
        spec = CodedArraySpec(name=f"codes/{packing.name}", dtype=packing.dtype, components=part.stop - part.start)
        arrays.append(coded_array(stream.path, spec, views, packing.length(tokens)))
    chunks = -(-stream.width * tokens // (_VALUES_PER_ESCAPE * _ESCAPES_PER_CHUNK))
    index = "int32" if stream.width * tokens < 2**31 else "int64"
    count = whole_array(f"{stream.path}/escapes/count", "int32", views, views=views)
    arrays.append(count)
    for name, dtype in (("index", index), ("value", "int16")):
        path = f"{stream.path}/escapes/{name}"
        arrays.append(ragged_array(path, dtype, views, chunks, _ESCAPES_PER_CHUNK, counted_by=count.path))
    return arrays + _sink_arrays(stream, views, tokens)


def _sink_arrays(stream: VectorStream, views: int, tokens: int) -> list[ArraySpec]:
    """The tokens of an `nmse` stream that are kept as they are; none where no tokens own the variance."""
    if stream.calibration is None or (sinks := stream.calibration.sinks) is None:
        return []
    width = stream.coded_width
    room = min(tokens, max(_SINKS_LEAST, math.ceil(tokens * (_SINKS_PER_SEEN * sinks.share + _SINKS_UNSEEN))))
    chunk = min(room, max(1, _SINK_NUMBERS_PER_CHUNK // width))
    index = "int32" if tokens < 2**31 else "int64"
    count = whole_array(f"{stream.path}/sinks/count", "int32", views, views=views)
    return [
        count,
        *(
            ragged_array(
                f"{stream.path}/sinks/{name}", dtype, views, -(-room // chunk), chunk, counted_by=count.path, width=each
            )
            for name, dtype, each in (("index", index, None), ("value", sinks.dtype, width))
        ),
    ]
