"""The streams of vectors that a manifest implies: which hidden states and attention vectors are stored, where, and how.

A target is what a user asks for; a stream is one array of vectors that is coded by itself. Several targets may read one
stream: attention that is computed from a hidden state shares that of hidden-state transfer. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.targets import AttentionSpec, View, nmse_target

VECTORS = ("query", "key", "value")
"""The three vectors of an attention layer, in the order in which weights are given."""


@dataclass(frozen=True, kw_only=True)
class VectorStream:
    """Vectors of one layer in one view, stored under `path`. `source` is `hidden`, `query`, `key` or `value`.

    `projected`: coded as the queries, keys and values that the next layer computes from this hidden state.
    `relation_heads`: what is kept of a token is its relation to each of T tokens in each of these heads.
    `calibration` is set in calibrated `nmse` streams only.
    """

    path: str
    source: str
    layer: int
    view: View
    codec: str
    width: int
    projected: bool = False
    relation_heads: int | None = None
    calibration: TransformRecord | None = None

    @property
    def target_nmse(self) -> float | None:
        """The error that an `nmse` codec is calibrated to; None in a fixed precision."""
        return nmse_target(self.codec)


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
        streams += _attention_streams(spec, width if spec.heads is None else spec.heads * manifest.seq_len)
    return tuple(replace(stream, calibration=manifest.calibration.get(stream.path)) for stream in streams)


def _attention_streams(spec: AttentionSpec, width: int) -> list[VectorStream]:
    """The streams of an attention target's own: none where it shares a hidden state."""
    if spec.form == "shared":
        return []
    if spec.mode == "hidden":
        sources: dict[str, tuple[str, int]] = {spec.form: ("hidden", spec.layer - 1)}
    else:
        folder = "relations/" if spec.form == "matrix" else ""
        sources = {f"{folder}{vector}": (vector, spec.layer) for vector in VECTORS}
    return [
        VectorStream(
            path=f"attention/{spec.layer}/{name}",
            source=source,
            layer=layer,
            view=spec.view,
            codec=spec.codec,
            width=width,
            projected=spec.form == "projected",
            relation_heads=spec.heads,
        )
        for name, (source, layer) in sources.items()
    ]


def attention_input_path(spec: AttentionSpec) -> str:
    """Where that lies from which the queries, keys and values of a `hidden`-mode attention target are computed."""
    return f"hidden/{spec.layer - 1}" if spec.form == "shared" else f"attention/{spec.layer}/{spec.form}"


def attention_folders(spec: AttentionSpec) -> tuple[str, ...]:
    """The folders that an attention target is read from."""
    if spec.mode == "hidden":
        return (attention_input_path(spec),)
    names = ("relations",) if spec.form == "matrix" else VECTORS
    return tuple(f"attention/{spec.layer}/{name}" for name in names)
