"""Where everything lies in a store: the zarr arrays that a manifest implies, their shapes, chunks and names.

Every array has one axis of blocks in front and one shard per block, so that a block is written, checked, repaired and
read by whole files. R rows a block, T positions, M places for masked positions, K kept entries, W views of a kind, N =
W * R * T tokens (token ((w * R) + r) * T + t is position t of row r in view w), P = W * R * M places (likewise).

    input_ids            [blocks, R, T]    int32      rows as packed, padded
    length, row_id, document  [blocks, R]             real positions; number in the corpus; number of its first document
    masked/positions, masked/original_ids, masked/replacement_ids  [blocks, W*R, M],  masked/count  [blocks, W*R]
    logits/ids/{low,middle,high}  [blocks, K, P]  uint8  bytes of the ids, most probable first: as many as V needs
    logits/log_probs     [blocks, K, P]               as coded by `distribution_codec.py`
    logits/log_tail      [blocks, P]       float16    log of the mass outside the K ids
    hidden/<l>/…         [blocks, D, N]               as coded by the vector codec
    attention/<l>/input/…, attention/<l>/{query,key,value}/…  likewise

Instead of the most probable ids, logits may hold K drawn ones, as `SampleCodec` packs them, E = R * M * K rounded up:

    logits/draws/distinct              [blocks, P]     uint8  how many distinct ids a place has
    logits/draws/ids/{low,middle,high}, logits/draws/counts  [blocks, W, E]  uint8  place after place

Attention in mode `matrix` is kept as relations, A heads, row w * R + r being row r in view w:

    attention/<l>/relations/{query,key,value}  [blocks, W*R, A, T, T]  float16

In an `nmse` codec a stream of vectors has, once it is calibrated, and with n = R * T tokens a view, `packing.py`:

    …/codes/<packing>    [blocks, D', W * length(n)]  the D' components of that packing
    …/escapes/count      [blocks, W]       int32      how many values of a view are beyond their packing
    …/escapes/index      [blocks, W, E]    int32      component * n + token (int64 where that is beyond 32 bits)
    …/escapes/value      [blocks, W, E]    int16
    …/basis, …/mean, …/step                           constants: x = mean + step * basis @ codes

and attention in mode `hidden` that shares no hidden state lies in attention/<l>/projected/… (x = all of q, k, v).

Nothing here touches a disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.codecs.base import CodedArraySpec
from teacher_cache.codecs.fixed import make_codec
from teacher_cache.codecs.logits import SampleCodec, TopkCodec
from teacher_cache.codecs.packing import ranges
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, VectorStream, vector_streams
from teacher_cache.contract.targets import LogitsSpec, nmse_target

ROW_ARRAYS = (("length", "int32"), ("row_id", "int64"), ("document", "int64"))
"""Arrays of one number per row, with their types."""
_CHUNK_BYTES = 2**19
_ESCAPES_PER_CHUNK = 2**14
_VALUES_PER_ESCAPE = 16
_DRAWS_PER_CHUNK = 2**15
_DRAWS = "logits/draws"


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the store: the shape of a block of it, and of the chunks that block is compressed in."""

    path: str
    dtype: str
    block_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]


def has_rows_first(path: str) -> bool:
    """Whether the axis behind the blocks has the rows of every view, W * R, and not its last axis tokens or places."""
    return path.startswith("masked/") or "/relations/" in path


def constant_paths(manifest: Manifest) -> tuple[str, ...]:
    """Every array that is not cut into blocks."""
    paths = [
        f"{stream.path}/{name}"
        for stream in vector_streams(manifest)
        if nmse_target(stream.codec) is not None
        for name in ("basis", "mean", "step")
    ]
    paths += [f"hidden/{layer}/variance" for layer in manifest.targets.hidden_layers()]
    paths += [
        projection_path(spec.layer, name, part)
        for spec in manifest.targets.attention
        if spec.mode == "hidden"
        for name in VECTORS
        for part in ("weight", "bias")
    ]
    return tuple(paths)


def projection_path(layer: int, vector: str, part: str) -> str:
    """Where the weight or bias lies that takes the input of an attention layer to its queries, keys or values."""
    return f"attention/{layer}/projection/{vector}/{part}"


def block_arrays(manifest: Manifest) -> tuple[ArraySpec, ...]:
    """Every array that is written block by block."""
    rows, positions = manifest.block_rows, manifest.seq_len
    arrays = []
    if not manifest.inputs_held:
        arrays = [_array("input_ids", "int32", rows, positions)]
        arrays += [_array(name, dtype, rows) for name, dtype in ROW_ARRAYS]
    if "masked" in manifest.targets.views() and "masked" not in manifest.inputs_held:
        masked_rows, places = manifest.views * rows, manifest.masked_per_row
        arrays += [
            _array(f"masked/{name}", "int32", masked_rows, places)
            for name in ("positions", "original_ids", "replacement_ids")
        ]
        arrays.append(_array("masked/count", "int32", masked_rows))
    if manifest.targets.logits is not None:
        arrays += _logits_arrays(manifest, manifest.targets.logits)
    for stream in vector_streams(manifest):
        views = manifest.views_of(stream.view)
        if nmse_target(stream.codec) is not None:
            arrays += _packed_arrays(stream, views, rows * positions)
            continue
        if stream.relation_heads is not None:
            arrays.append(_relation_array(stream, views * rows, positions))
            continue
        arrays += [
            _coded(stream.path, spec, views, rows * positions) for spec in make_codec(stream.codec).arrays(stream.width)
        ]
    return tuple(arrays)


def _relation_array(stream: VectorStream, rows: int, positions: int) -> ArraySpec:
    """Chunks hold some heads of one row, so that a reader can take any rows."""
    heads, itemsize = stream.relation_heads or 0, 2
    wanted = max(1, _CHUNK_BYTES // (positions**2 * itemsize))
    return ArraySpec(
        path=stream.path,
        dtype=stream.codec,
        block_shape=(rows, heads, positions, positions),
        chunk_shape=(1, _largest_divisor(heads, wanted), positions, positions),
    )


def _packed_arrays(stream: VectorStream, views: int, tokens: int) -> list[ArraySpec]:
    """The arrays of an `nmse` stream; none before it is calibrated."""
    if stream.calibration is None:
        return []
    arrays = []
    for packing, part in ranges(stream.calibration.components):
        spec = CodedArraySpec(name=f"codes/{packing.name}", dtype=packing.dtype, components=part.stop - part.start)
        arrays.append(_coded(stream.path, spec, views, packing.length(tokens)))
    chunks = -(-stream.width * tokens // (_VALUES_PER_ESCAPE * _ESCAPES_PER_CHUNK))
    index = "int32" if stream.width * tokens < 2**31 else "int64"
    arrays.append(_array(f"{stream.path}/escapes/count", "int32", views))
    for name, dtype in (("index", index), ("value", "int16")):
        arrays.append(
            ArraySpec(
                path=f"{stream.path}/escapes/{name}",
                dtype=dtype,
                block_shape=(views, chunks * _ESCAPES_PER_CHUNK),
                chunk_shape=(1, _ESCAPES_PER_CHUNK),
            )
        )
    return arrays


def _logits_arrays(manifest: Manifest, spec: LogitsSpec) -> list[ArraySpec]:
    views, places = manifest.views_of(spec.view), manifest.block_rows * manifest.masked_per_row
    if spec.form == "topk":
        return [_coded("logits", array, views, places) for array in topk_codec(manifest, spec).arrays()]
    distinct = CodedArraySpec(name="distinct", dtype="uint8", components=None)
    room = -(-places * spec.entries // _DRAWS_PER_CHUNK) * _DRAWS_PER_CHUNK
    return [
        _coded(_DRAWS, distinct, views, places),
        *(
            ArraySpec(path=path, dtype="uint8", block_shape=(views, room), chunk_shape=(1, _DRAWS_PER_CHUNK))
            for path in draw_paths(manifest, spec).values()
        ),
    ]


def topk_codec(manifest: Manifest, spec: LogitsSpec) -> TopkCodec:
    """The codec of `logits/` in the form `topk`."""
    return TopkCodec(entries=spec.entries, vocab_size=manifest.teacher.vocab_size, log_probs=spec.codec)


def sample_codec(manifest: Manifest, spec: LogitsSpec) -> SampleCodec:
    """The codec of `logits/draws/` in the form `sample`."""
    return SampleCodec(draws=spec.entries, vocab_size=manifest.teacher.vocab_size)


def draw_paths(manifest: Manifest, spec: LogitsSpec) -> dict[str, str]:
    """Where each array of one byte a drawn id lies, by the codec's name for it."""
    return {name: f"{_DRAWS}/{name}" for name in sample_codec(manifest, spec).entry_names()}


def ragged_count(path: str) -> str | None:
    """The array that says how much of this one a view has, for arrays [blocks, W, room]; None for all others.

    The view's count is the sum of its numbers there.
    """
    for folder, count in (("escapes", "count"), ("draws", "distinct")):
        before, found, name = path.partition(f"/{folder}/")
        if found and name != count:
            return f"{before}/{folder}/{count}"
    return None


def _array(path: str, dtype: str, *block_shape: int) -> ArraySpec:
    return ArraySpec(path=path, dtype=dtype, block_shape=block_shape, chunk_shape=block_shape)


def _coded(folder: str, spec: CodedArraySpec, views: int, tokens_per_view: int) -> ArraySpec:
    """A coded array: chunks hold one view of a few components, so that a reader can take a single view."""
    path = f"{folder}/{spec.name}"
    if spec.components is None:
        return ArraySpec(
            path=path, dtype=spec.dtype, block_shape=(views * tokens_per_view,), chunk_shape=(tokens_per_view,)
        )
    itemsize = {"8": 1, "6": 2, "2": 4}[spec.dtype[-1]]  # int8 and uint8, float16, float32 and int32
    wanted = max(1, _CHUNK_BYTES // (tokens_per_view * itemsize))
    components = _largest_divisor(spec.components, wanted)
    return ArraySpec(
        path=path,
        dtype=spec.dtype,
        block_shape=(spec.components, views * tokens_per_view),
        chunk_shape=(components, tokens_per_view),
    )


def _largest_divisor(number: int, most: int) -> int:
    return max(part for part in range(1, min(most, number) + 1) if number % part == 0)
