"""What a stream keeps of a pass is taken from its layer and its source."""

from __future__ import annotations

from collections.abc import Callable

import torch

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, vector_streams
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.teacher.outputs import TeacherOutputs, stream_values


def test_each_stream_has_its_own_values(plain_manifest: Callable[..., Manifest]) -> None:
    """Hidden state 2 for itself and as the input of attention 3; queries, keys and values of layers 1 and 2."""
    attention = (
        AttentionSpec(layer=1, form="vectors", codec="int8"),
        AttentionSpec(layer=2, form="matrix", codec="float16", heads=2),
        AttentionSpec(layer=3, form="input", codec="int8"),
    )
    manifest = plain_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec="int4"),), attention=attention))
    values = {(source, layer): torch.randn(1, 2, 4) for source in ("hidden", *VECTORS) for layer in (1, 2)}
    outputs = TeacherOutputs(
        hidden={layer: values["hidden", layer] for layer in (1, 2)},
        attention={
            layer: AttentionVectors(**{f"{name}_BTD": values[name, layer] for name in VECTORS}) for layer in (1, 2)
        },
        final_BTD=torch.zeros(1, 2, 4),
    )
    real_BT = torch.ones(1, 2, dtype=torch.bool)
    taken = {stream.path: stream_values(stream, outputs, real_BT) for stream in vector_streams(manifest)}
    want = {"hidden/2": ("hidden", 2), "attention/3/input": ("hidden", 2)}
    want |= {f"attention/1/{name}": (name, 1) for name in VECTORS}
    relations = {f"attention/2/relations/{name}": values[name, 2] for name in VECTORS}
    assert taken.keys() == want.keys() | relations.keys()
    assert all(torch.equal(taken[path], values[source]) for path, source in want.items())
    for path, vectors_BTD in relations.items():
        for head, vectors_Td in enumerate(vectors_BTD[0].double().split(2, dim=1)):
            plain_TT = (vectors_Td @ vectors_Td.T / 2**0.5).softmax(-1)
            # of each token its relations to all tokens, head after head
            torch.testing.assert_close(
                taken[path][0, :, 2 * head : 2 * head + 2].double(), plain_TT, rtol=1e-5, atol=1e-6
            )
