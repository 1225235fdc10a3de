"""The learned linear maps from the student's hidden states to the teacher's. They never reach the exported student.

One per pair of layers. Where a mapping weighs all pairs by itself (`emd`, `alp`) there is one per student layer, for
all teacher layers: S maps, not S x T of them. For 6 layers of 768 against 24 of 1024 that is 4.7 million numbers, with
their gradients and Adam's moments 76 MB in float32, where a map per pair would be 1.8 GB.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from student_train.layer_map import LayerMapping
from teacher_cache.codecs.nmse import Transform
from teacher_cache.contract.layers import uniform_layers


class FloatLinear(nn.Linear):
    """A linear map that computes in float32 even when an engine keeps the whole model in half precision.

    With a `rotation` it gives the rotated coordinates of what it maps to, Q^T (W h + b - mean), while W and b are
    learned as they are: Adam treats every coordinate by itself, so that a map learned in rotated ones becomes another,
    seen to be the worse one. Q^T W costs 2 D^3 operations a pass, where rotating N targets back costs 2 N D^2.
    """

    rotation: Transform | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        weight, bias = self.weight.float(), self.bias.float()
        if self.rotation is not None:
            if self.rotation.basis_DK.device != input.device:
                self.rotation = self.rotation.to(input.device)
            basis_KD = self.rotation.basis_DK.T
            weight, bias = basis_KD @ weight, basis_KD @ (bias - self.rotation.mean_D)
        return linear(input.float(), weight, bias)

    @torch.no_grad()
    def start_at(self, weight: Tensor, bias: Tensor) -> None:
        """Make W h + b what the module gives, in rotated coordinates if it has a rotation."""
        if self.rotation is not None:
            rotation = self.rotation.to(weight.device)
            basis_DK, mean_D = rotation.basis_DK.to(weight.dtype), rotation.mean_D.to(weight.dtype)
            weight, bias = basis_DK @ weight, basis_DK @ bias + mean_D
        self.weight.copy_(weight)
        self.bias.copy_(bias)


def projection_starts(
    mapping: LayerMapping, student_width: int, teacher_width: int, deviations: Mapping[int, float]
) -> dict[str, float]:
    """The maps that a mapping needs, by name, and the multiple of the identity that each starts at.

    1 for a pair. A student layer's map for all teacher layers, whose `deviations` are divided out, starts where the
    layer of `uniform` is met, which is the one that its weights may be copied from. `skip` needs no maps where the
    widths match.
    """
    if mapping.weighs_all:
        nearest = uniform_layers(len(mapping.teacher_layers), len(mapping.student_layers))
        return {
            projection_name(layer): 1 / deviations[max(1, near)]
            for layer, near in zip(mapping.student_layers, nearest, strict=True)
        }
    if mapping.form == "skip" and student_width == teacher_width:
        return {}
    return {projection_name(*pair): 1.0 for pair in mapping.pairs}


def make_projections(starts: Mapping[str, float], student_width: int, teacher_width: int, seed: int) -> nn.ModuleDict:
    """Linear maps by name: a multiple of the identity where the widths match, else random of deviation 0.02; bias 0."""
    generator = torch.Generator().manual_seed(seed)
    maps = {name: make_map(student_width, teacher_width, generator, start=start) for name, start in starts.items()}
    return nn.ModuleDict(maps)


def make_map(student_width: int, teacher_width: int, generator: torch.Generator, *, start: float = 1.0) -> FloatLinear:
    """One linear map: `start` times the identity where the widths match, else random of deviation 0.02; bias 0."""
    linear_map = FloatLinear(student_width, teacher_width)
    nn.init.zeros_(linear_map.bias)
    if student_width == teacher_width:
        nn.init.eye_(linear_map.weight)
        with torch.no_grad():
            linear_map.weight.mul_(start)
    else:
        nn.init.normal_(linear_map.weight, std=0.02, generator=generator)
    return linear_map


def projection_name(student_layer: int, teacher_layer: int | None = None) -> str:
    """Name among the projections of a pair's linear map, or of a student layer's for all teacher layers."""
    return f"student_{student_layer}" if teacher_layer is None else f"student_{student_layer}_teacher_{teacher_layer}"
