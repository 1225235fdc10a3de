"""Hidden states and attention: what is decoded beside what the teacher gives.

Vectors are compared as students get them. A stream in a codec with a bound is held to it value by value, a calibrated
stream to its declared NMSE. Attention that is computed from a stored hidden state declares no error of its own: it is
held to what the codec's error on the live hidden state becomes on its way through the projections, which finds wrong
projections too.

A derived store was rounded twice, and nothing in it says so: bounds have room for half precision before the codec.

Shapes: B rows, A relation heads, T positions, N real positions of a row, D and H widths, K coordinates.
"""

from __future__ import annotations

import torch

from teacher_cache.codecs.fixed import Float16Codec, make_codec
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.contract.batch import AttentionRelations, AttentionVectors, TargetBatch
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, VectorStream, attention_input_path
from teacher_cache.contract.targets import AttentionSpec
from teacher_cache.format.transforms import read_projections, read_transform
from teacher_cache.models.attention import relation_matrices
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.outputs import TeacherOutputs, stream_values
from teacher_cache.verify.deep.rows import DeepRow
from teacher_cache.verify.deep.tolerance import LargestError, TargetCheck, VectorErrors, arithmetic


class StreamComparison:
    """A stream of vectors that students get as it is stored."""

    def __init__(self, manifest: Manifest, stream: VectorStream) -> None:
        self.stream = stream
        declared = None if stream.calibration is None else stream.calibration.nmse
        self.errors = VectorErrors(stream.path, declared, manifest.dtype)

    def add(self, row: DeepRow) -> None:
        real_T = row.targets.real_BT()[0]
        live_ND, alone_ND = (self._computed(outputs)[0][real_T].float() for outputs in (row.live, row.alone))
        have_ND = self._stored(row.targets)[0][real_T]
        bound_ND = None if self.stream.calibration is not None else _bound(self.stream.codec, live_ND)
        self.errors.add(have_ND, live_ND, alone_ND, bound_ND=bound_ND)

    def _computed(self, outputs: TeacherOutputs) -> torch.Tensor:
        if self.stream.projected:
            return _stack(outputs.attention[self.stream.layer + 1])
        return stream_values(self.stream, outputs)

    def _stored(self, targets: TargetBatch) -> torch.Tensor:
        if self.stream.projected:
            return _stack(targets.attention[self.stream.layer + 1])
        if self.stream.source == "hidden":
            return targets.hidden[self.stream.layer]
        vectors: torch.Tensor = getattr(targets.attention[self.stream.layer], f"{self.stream.source}_BTD")
        return vectors

    def results(self) -> list[TargetCheck]:
        return [self.errors.result()]


def _bound(codec: str, values_ND: torch.Tensor) -> torch.Tensor:
    half_ND = Float16Codec().error_bound_ND(values_ND)
    if codec == "float16":
        return half_ND
    return make_codec(codec).error_bound_ND(values_ND) * (1 + 2.0**-10) + half_ND


class CarriedComparison:
    """Attention that is computed from a stored hidden state."""

    def __init__(self, reader: CacheReader, spec: AttentionSpec) -> None:
        self.spec = spec
        projections = read_projections(reader.storage, spec.layer)
        self.weight_DH = torch.cat([getattr(projections, name).weight for name in VECTORS]).double()
        path, manifest = attention_input_path(spec), reader.manifest
        self.declared = manifest.calibration[path].nmse if path in manifest.calibration else None
        self.transform = None if self.declared is None else read_transform(reader.storage, path)
        self.errors = VectorErrors(f"attention/{spec.layer}", None, manifest.dtype)
        self.rounding = VectorErrors(path, self.declared, manifest.dtype)

    def add(self, row: DeepRow) -> None:
        real_T = row.targets.real_BT()[0]
        live_ND, alone_ND = (
            _stack(outputs.attention[self.spec.layer])[0][real_T].float() for outputs in (row.live, row.alone)
        )
        input_NH = row.live.hidden[self.spec.layer - 1][0][real_T].float()
        coded_NH = self._coded(input_NH)
        self.rounding.add(coded_NH, input_NH, input_NH)
        carried_ND = (coded_NH - input_NH).double() @ self.weight_DH.T
        have_ND = _stack(row.targets.attention[self.spec.layer])[0][real_T]
        self.errors.add(have_ND, live_ND, alone_ND, expected=float(carried_ND.square().sum()))

    def _coded(self, values_NH: torch.Tensor) -> torch.Tensor:
        """What the codec makes of vectors."""
        if self.transform is not None:
            codes_KN = Quantiser(self.transform, None).quantise(values_NH)
            return self.transform.synthesise(codes_KN.T * self.transform.step)
        codec = make_codec(self.spec.codec)
        return codec.decode({name: torch.from_numpy(values) for name, values in codec.encode(values_NH).items()})

    def results(self) -> list[TargetCheck]:
        # what is declared may be more than one rounding: that of the store from which this one was derived
        rounded = self.rounding.result().stored
        scale = max(1.0, self.declared / rounded) if self.declared and rounded else 1.0
        return [self.errors.result(scale)]


class RelationComparison:
    """Relations of attention vectors, kept as matrices."""

    def __init__(self, manifest: Manifest, stream: VectorStream) -> None:
        self.stream = stream
        self.dtype = manifest.dtype
        self.errors = LargestError(stream.path, "largest |p - p'|")

    def add(self, row: DeepRow) -> None:
        heads, real_BT = self.stream.relation_heads, row.targets.real_BT()
        assert heads is not None
        real_T = real_BT[0]
        have, live, alone = (
            matrices_BATT[0][:, real_T][:, :, real_T].double()
            for matrices_BATT in (
                getattr(row.targets.attention[self.stream.layer], f"{self.stream.source}_BATT"),
                relation_matrices(stream_values(self.stream, row.live), heads, real_BT),
                relation_matrices(stream_values(self.stream, row.alone), heads, real_BT),
            )
        )
        noise = (alone - live).abs()
        bound = Float16Codec().error_bound_ND(live)
        self.errors.add((have - live).abs(), bound, noise, arithmetic(noise, 1.0, self.dtype))

    def results(self) -> list[TargetCheck]:
        return [self.errors.result()]


def _stack(vectors: AttentionVectors | AttentionRelations) -> torch.Tensor:
    """Queries, keys and values side by side, [B, T, 3D]."""
    return torch.cat([getattr(vectors, f"{name}_BTD") for name in VECTORS], dim=2)
