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
from teacher_cache.codecs.relations import RelationCodec
from teacher_cache.contract.batch import AttentionRelations, AttentionVectors, TargetBatch
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, VectorStream
from teacher_cache.format.transforms import read_projections, read_transform
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
        live_ND, alone_ND = (self._computed(row, outputs)[0][real_T].float() for outputs in (row.live, row.alone))
        have_ND = self._stored(row.targets)[0][real_T]
        if self.stream.calibration is None:
            self.errors.add(have_ND, live_ND, alone_ND, bound_ND=_bound(self.stream.codec, live_ND))
            return
        ordinary_N = self._ordinary_BT(row.targets)[0][real_T]
        self.errors.add(have_ND[ordinary_N], live_ND[ordinary_N], alone_ND[ordinary_N])
        have_SD, live_SD, alone_SD = (values_ND[~ordinary_N] for values_ND in (have_ND, live_ND, alone_ND))
        self.errors.add_sinks(have_SD, live_SD, alone_SD, Float16Codec().error_bound_ND(live_SD))

    def _ordinary_BT(self, targets: TargetBatch) -> torch.Tensor:
        hidden = self.stream.source == "hidden" and not self.stream.projected
        if hidden:
            return targets.ordinary_BT(self.stream.layer)
        return targets.ordinary_attention_BT(self.stream.attention_layer)

    def _computed(self, row: DeepRow, outputs: TeacherOutputs) -> torch.Tensor:
        if self.stream.projected:
            return _stack(outputs.attention[self.stream.attention_layer])
        return stream_values(self.stream, outputs, row.targets.real_BT())

    def _stored(self, targets: TargetBatch) -> torch.Tensor:
        if self.stream.projected:
            return _stack(targets.attention[self.stream.attention_layer])
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
    """Attention that is computed from a stored hidden state, or from what its projections read.

    What a codec's error becomes on its way through the projections is as large after positions have turned it.
    """

    def __init__(self, reader: CacheReader, layer: int, stream: VectorStream) -> None:
        """Attention of `layer`, from what is kept in `stream`."""
        self.layer = layer
        self.stream = stream
        projections = read_projections(reader.storage, reader.manifest, layer)
        self.weight_DH = torch.cat([getattr(projections, name).weight for name in VECTORS]).double()
        self.declared = None if stream.calibration is None else stream.calibration.nmse
        self.transform = None if stream.calibration is None else read_transform(reader.storage, stream)
        self.errors = VectorErrors(f"attention/{layer}", None, reader.manifest.dtype)
        self.rounding = VectorErrors(stream.path, self.declared, reader.manifest.dtype)

    def add(self, row: DeepRow) -> None:
        real_T = row.targets.real_BT()[0]
        live_ND, alone_ND = (
            _stack(outputs.attention[self.layer])[0][real_T].float() for outputs in (row.live, row.alone)
        )
        input_NH = stream_values(self.stream, row.live, row.targets.real_BT())[0][real_T].float()
        have_ND = _stack(row.targets.attention[self.layer])[0][real_T]
        ordinary_N = row.targets.ordinary_attention_BT(self.layer)[0][real_T]
        have_SD, live_SD, alone_SD = (values_ND[~ordinary_N] for values_ND in (have_ND, live_ND, alone_ND))
        bound_SH = Float16Codec().error_bound_ND(input_NH[~ordinary_N]).double()
        self.errors.add_sinks(have_SD, live_SD, alone_SD, bound_SH @ self.weight_DH.abs().T)
        input_NH = input_NH[ordinary_N]
        coded_NH = self._coded(input_NH)
        self.rounding.add(coded_NH, input_NH, input_NH)
        carried_ND = (coded_NH - input_NH).double() @ self.weight_DH.T
        expected = float(carried_ND.square().sum())
        self.errors.add(have_ND[ordinary_N], live_ND[ordinary_N], alone_ND[ordinary_N], expected=expected)

    def _coded(self, values_NH: torch.Tensor) -> torch.Tensor:
        """What the codec makes of vectors."""
        if self.transform is not None:
            codes_KN = Quantiser(self.transform, None).quantise(values_NH)
            return self.transform.synthesise(codes_KN.T * self.transform.step)
        codec = make_codec(self.stream.codec)
        return codec.decode({name: torch.from_numpy(values) for name, values in codec.encode(values_NH).items()})

    def results(self) -> list[TargetCheck]:
        # what is declared may be more than one rounding: that of the store from which this one was derived
        rounded = self.rounding.result().stored
        scale = max(1.0, self.declared / rounded) if self.declared and rounded else 1.0
        return [self.errors.result(scale)]


class RelationComparison:
    """Relations of attention vectors, kept as matrices."""

    def __init__(self, manifest: Manifest, stream: VectorStream) -> None:
        assert stream.relation_heads is not None
        self.stream = stream
        self.codec = RelationCodec(stream.relation_heads)
        self.dtype = manifest.dtype
        self.errors = LargestError(stream.path, "largest |p - p'|")

    def add(self, row: DeepRow) -> None:
        real_BT = row.targets.real_BT()
        matrices_BATT = getattr(row.targets.attention[self.stream.layer], f"{self.stream.source}_BATT")
        have_ND = self.codec.decode({"": matrices_BATT})[real_BT[0]].double()
        live_ND, alone_ND = (
            stream_values(self.stream, outputs, real_BT)[0][real_BT[0]].double() for outputs in (row.live, row.alone)
        )
        noise_ND, bound_ND = (alone_ND - live_ND).abs(), self.codec.error_bound_ND(live_ND)
        self.errors.add((have_ND - live_ND).abs(), bound_ND, noise_ND, arithmetic(noise_ND, 1.0, self.dtype))

    def results(self) -> list[TargetCheck]:
        return [self.errors.result()]


def _stack(vectors: AttentionVectors | AttentionRelations) -> torch.Tensor:
    """Queries, keys and values side by side, [B, T, 3D]."""
    return torch.cat([getattr(vectors, f"{name}_BTD") for name in VECTORS], dim=2)
