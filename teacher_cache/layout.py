"""Where everything lies in a store: the zarr arrays that a manifest implies, their shapes, chunks and names.

Every array has one axis of blocks in front and one shard per block, so that a block is written, checked, repaired and
read by whole files. R rows a block, T positions, M places for masked positions, K kept entries, W views of a kind, N =
W * R * T tokens (token ((w * R) + r) * T + t is position t of row r in view w), P = W * R * M places (likewise).

    input_ids            [blocks, R, T]    int32      rows as packed, padded
    length, row_id, document  [blocks, R]             real positions; number in the corpus; number of its first document
    masked/positions, masked/original_ids, masked/replacement_ids  [blocks, W*R, M],  masked/count  [blocks, W*R]
    logits/ids           [blocks, K, P]    int32      most probable first
    logits/log_probs/…   [blocks, K, P]               as coded by the log-probability codec
    logits/log_tail      [blocks, P]       float16    log of the mass outside the K ids
    hidden/<l>/…         [blocks, D, N]               as coded by the vector codec
    attention/<l>/input/…, attention/<l>/{query,key,value}/…  likewise

Nothing here touches a disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.codec import CodedArraySpec, LogProbabilityCodec, make_codec
from teacher_cache.contract import AttentionSpec, Manifest, View
from teacher_cache.relations import VECTORS

_CHUNK_BYTES = 2**19


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the store: the shape of a block of it, and of the chunks that block is compressed in."""

    path: str
    dtype: str
    block_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VectorStream:
    """Vectors of one layer in one view, stored under `path`. `source` is `hidden`, `query`, `key` or `value`."""

    path: str
    source: str
    layer: int
    view: View
    codec: str
    width: int


def vector_streams(manifest: Manifest) -> tuple[VectorStream, ...]:
    """Every stream of vectors that the store holds, each once."""
    targets, width = manifest.targets, manifest.teacher.hidden_size
    streams = [
        VectorStream(
            path=f"hidden/{spec.layer}",
            source="hidden",
            layer=spec.layer,
            view=spec.view,
            codec=spec.codec,
            width=width,
        )
        for spec in targets.hidden
    ]
    for spec in targets.attention:
        if not targets.shares_hidden(spec):
            streams.extend(_attention_streams(spec, width))
    return tuple(streams)


def _attention_streams(spec: AttentionSpec, width: int) -> list[VectorStream]:
    folder = f"attention/{spec.layer}"
    sources = {"input": ("hidden", spec.layer - 1)} if spec.mode == "hidden" else {v: (v, spec.layer) for v in VECTORS}
    return [
        VectorStream(path=f"{folder}/{name}", source=source, layer=layer, view=spec.view, codec=spec.codec, width=width)
        for name, (source, layer) in sources.items()
    ]


def attention_input_path(manifest: Manifest, spec: AttentionSpec) -> str:
    """Where the hidden state lies that a `hidden`-mode attention target projects."""
    return f"hidden/{spec.layer - 1}" if manifest.targets.shares_hidden(spec) else f"attention/{spec.layer}/input"


def block_arrays(manifest: Manifest) -> tuple[ArraySpec, ...]:
    """Every array that is written block by block."""
    rows, positions = manifest.block_rows, manifest.seq_len
    arrays = [_array("input_ids", "int32", rows, positions)]
    arrays += [
        _array(name, dtype, rows) for name, dtype in (("length", "int32"), ("row_id", "int64"), ("document", "int64"))
    ]
    if "masked" in manifest.targets.views():
        masked_rows, places = manifest.views * rows, manifest.masked_per_row
        arrays += [
            _array(f"masked/{name}", "int32", masked_rows, places)
            for name in ("positions", "original_ids", "replacement_ids")
        ]
        arrays.append(_array("masked/count", "int32", masked_rows))
    if manifest.targets.logits is not None:
        arrays += _logits_arrays(manifest)
    for stream in vector_streams(manifest):
        views = manifest.views_of(stream.view)
        arrays += [
            _coded(stream.path, spec, views, rows * positions) for spec in make_codec(stream.codec).arrays(stream.width)
        ]
    return tuple(arrays)


def _logits_arrays(manifest: Manifest) -> list[ArraySpec]:
    spec = manifest.targets.logits
    assert spec is not None
    views, places = manifest.views_of(spec.view), manifest.block_rows * manifest.masked_per_row
    ids = CodedArraySpec(name="ids", dtype="int32", components=spec.entries)
    tail = CodedArraySpec(name="log_tail", dtype="float16", components=None)
    arrays = [_coded("logits", array, views, places) for array in (ids, tail)]
    coded = LogProbabilityCodec(spec.codec).arrays(spec.entries)
    return arrays + [_coded("logits/log_probs", array, views, places) for array in coded]


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
    components = max(part for part in range(1, min(wanted, spec.components) + 1) if spec.components % part == 0)
    return ArraySpec(
        path=path,
        dtype=spec.dtype,
        block_shape=(spec.components, views * tokens_per_view),
        chunk_shape=(components, tokens_per_view),
    )
