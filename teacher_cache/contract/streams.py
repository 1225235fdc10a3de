"""The streams of vectors that a manifest implies: which hidden states and attention vectors are stored, where, and how.

A target is what a user asks for; a stream is one array of vectors that is coded by itself. Several targets may read one
stream: attention that is computed from a hidden state shares that of hidden-state transfer. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, View, nmse_target

VECTORS = ("query", "key", "value")
"""The three vectors of an attention layer, in the order in which weights are given."""


@dataclass(frozen=True, kw_only=True)
class VectorStream:
    """Vectors of one layer in one view, stored under `path`.

    `source`: `hidden` states, what the projections of an attention layer are `given`, behind its norm, or its `query`,
    `key` or `value`.
    `made_widths`: widths of the queries, keys and values that are computed from these vectors, if they are kept for
    that; with `projected` they are coded as those three side by side.
    `relation_heads`: what is kept of a token is its relation to each of T tokens in each of these heads.
    `calibration` is set in calibrated `nmse` streams only. `width` counts the numbers kept of a token.
    """

    path: str
    source: str
    layer: int
    view: View
    codec: str
    width: int
    made_widths: tuple[int, int, int] | None = None
    projected: bool = False
    relation_heads: int | None = None
    calibration: TransformRecord | None = None

    @property
    def attention_layer(self) -> int:
        """The attention layer that reads these vectors, or whose vectors they are."""
        return self.layer + 1 if self.source == "hidden" else self.layer

    @property
    def makes_attention(self) -> bool:
        """Whether an attention layer's queries, keys and values are computed from vectors of this kind."""
        return self.source in ("hidden", "given")

    @property
    def coded_width(self) -> int:
        """D, the numbers of a token that an `nmse` codec is about."""
        return self.width if not self.projected or self.made_widths is None else sum(self.made_widths)

    @property
    def target_nmse(self) -> float | None:
        """The error that an `nmse` codec is calibrated to; None in a fixed precision."""
        return nmse_target(self.codec)


def vector_streams(manifest: Manifest) -> tuple[VectorStream, ...]:
    """Every stream of vectors that the store holds, each once."""
    streams = [_hidden_stream(manifest, spec) for spec in manifest.targets.hidden]
    for spec in manifest.targets.attention:
        if spec.form != "shared":
            streams += _read_from(manifest, spec)
    return tuple(streams)


def attention_streams(manifest: Manifest) -> dict[int, tuple[VectorStream, ...]]:
    """What each attention target is read from, by its layer: whatever its form, these streams say how it is held.

    One stream of what the layer reads, from which queries, keys and values are computed, or one for each of the three.
    A hidden state that is shared may be in another group than the attention.
    """
    return {spec.layer: tuple(_read_from(manifest, spec)) for spec in manifest.targets.attention}


def _read_from(manifest: Manifest, spec: AttentionSpec) -> list[VectorStream]:
    if spec.form == "shared":
        return [_hidden_stream(manifest, HiddenSpec(layer=spec.layer - 1, codec=spec.codec, view=spec.view))]
    hidden_size = manifest.teacher.hidden_size
    if spec.form in ("vectors", "matrix"):
        folder = "relations/" if spec.form == "matrix" else ""
        widths = spec.vector_widths(hidden_size)
        if spec.heads is not None:
            widths = (spec.heads * manifest.seq_len,) * 3
        sources = {
            f"{folder}{vector}": (vector, spec.layer, width) for vector, width in zip(VECTORS, widths, strict=True)
        }
    elif spec.form == "replayed":
        sources = {spec.form: ("given", spec.layer, hidden_size)}
    else:
        sources = {spec.form: ("hidden", spec.layer - 1, hidden_size)}
    projected = spec.form == "projected" or (spec.form == "replayed" and nmse_target(spec.codec) is not None)
    paths = {name: f"attention/{spec.layer}/{name}" for name in sources}
    return [
        VectorStream(
            path=paths[name],
            source=source,
            layer=layer,
            view=spec.view,
            codec=spec.codec,
            width=width,
            made_widths=spec.vector_widths(hidden_size) if source in ("hidden", "given") else None,
            projected=projected,
            relation_heads=spec.heads,
            calibration=manifest.calibration.get(paths[name]),
        )
        for name, (source, layer, width) in sources.items()
    ]


def _hidden_stream(manifest: Manifest, spec: HiddenSpec) -> VectorStream:
    path = f"hidden/{spec.layer}"
    return VectorStream(
        path=path,
        source="hidden",
        layer=spec.layer,
        view=spec.view,
        codec=spec.codec,
        width=manifest.teacher.hidden_size,
        calibration=manifest.calibration.get(path),
    )
