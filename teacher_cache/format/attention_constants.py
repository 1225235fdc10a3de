"""Small arrays beside the vectors of an attention layer: the maps to its queries, keys and values, and what turns them.

Where they lie and which shape they have, as a manifest implies it. Nothing here touches a disk.
"""

from __future__ import annotations

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.format.arrays import ConstantSpec

ROTARY_PARTS = ("cosine", "sine")


def projection_path(layer: int, vector: str, part: str) -> str:
    """Where the weight or bias lies that takes the input of an attention layer to its queries, keys or values."""
    return f"attention/{layer}/projection/{vector}/{part}"


def rotary_path(layer: int, part: str) -> str:
    """Where the cosines or sines lie that turn queries and keys of an attention layer."""
    return f"attention/{layer}/rotary/{part}"


def projection_constants(manifest: Manifest, layer: int) -> dict[str, ConstantSpec]:
    """The maps from the input of an attention layer to its queries, keys and values."""
    spec, given = manifest.targets.find_attention(layer), manifest.teacher.hidden_size
    assert spec is not None
    return {
        projection_path(layer, vector, part): ConstantSpec(dtype="float32", shape=shape)
        for vector, width in zip(VECTORS, spec.vector_widths(given), strict=True)
        for part, shape in {"weight": (width, given), "bias": (width,)}.items()
    }


def rotary_constants(manifest: Manifest, layer: int) -> dict[str, ConstantSpec]:
    """Cosines and sines of each position, where an attention layer has positions to replay."""
    spec = manifest.targets.find_attention(layer)
    if spec is None or spec.replay is None:
        return {}
    shape = (manifest.seq_len, spec.replay.rotated)
    return {rotary_path(layer, part): ConstantSpec(dtype="float32", shape=shape) for part in ROTARY_PARTS}
