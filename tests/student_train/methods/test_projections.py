"""The learned maps: how many, where they start, and their arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from student_train.layer_map import parse_mapping
from student_train.methods.projections import FloatLinear, make_projections, projection_starts

DEVIATIONS = {1: 0.5, 2: 1.0, 3: 2.0, 4: 4.0}


def projections(mapping: str, width: int, seed: int = 0) -> nn.ModuleDict:
    starts = projection_starts(parse_mapping(mapping, 4, 2), width, 32, DEVIATIONS)
    return make_projections(starts, width, 32, seed)


@pytest.mark.parametrize(
    ("mapping", "same", "narrower"),
    [
        ("uniform+last", ["student_1_teacher_2", "student_1_teacher_3", "student_2_teacher_4"], None),
        ("skip", [], ["student_1_teacher_2"]),
        ("emd", ["student_1", "student_2"], None),
        ("alp", ["student_1", "student_2"], None),
    ],
)
def test_one_per_pair_or_per_student_layer(mapping: str, same: list[str], narrower: list[str] | None) -> None:
    assert list(projections(mapping, 32)) == same
    assert list(projections(mapping, 24)) == (narrower or same)


def test_between_equal_widths_they_start_at_the_identity() -> None:
    x_PD = torch.randn(3, 32)
    assert all(torch.equal(projection(x_PD), x_PD) for projection in projections("uniform", 32).values())


@pytest.mark.parametrize("mapping", ["emd", "alp"])
def test_for_all_layers_they_start_in_units_of_the_uniform_one(mapping: str) -> None:
    x_PD = torch.randn(3, 32)
    first, second = projections(mapping, 32).values()
    # layers 2 and 4 of the teacher
    assert torch.equal(first(x_PD), x_PD) and torch.equal(second(x_PD), x_PD / 4)


def test_between_other_widths_they_start_small_and_seeded() -> None:
    first, again, other = projections("uniform", 24, 1), projections("uniform", 24, 1), projections("uniform", 24, 2)
    name = "student_1_teacher_2"
    weight = first[name].weight
    assert isinstance(weight, torch.Tensor) and weight.shape == (32, 24) and weight.dtype == torch.float32
    assert 0.01 < weight.std().item() < 0.03
    assert torch.equal(weight, again[name].weight)  # type: ignore[arg-type]
    assert not torch.equal(weight, other[name].weight)  # type: ignore[arg-type]
    assert not torch.equal(weight, first["student_2_teacher_4"].weight)  # type: ignore[arg-type]


def test_they_compute_in_float32_when_kept_in_half_precision() -> None:
    projection = FloatLinear(8, 4).bfloat16()
    x_PD = torch.randn(3, 8).bfloat16()
    expected = x_PD.double() @ projection.weight.double().T + projection.bias.double()
    torch.testing.assert_close(projection(x_PD).double(), expected, rtol=1e-5, atol=1e-6)
