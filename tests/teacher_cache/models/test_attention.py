"""Attention vectors beside plain float64 loops."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import SettingsError
from teacher_cache.models.attention import (
    AttentionProjections,
    Projection,
    Replay,
    project_hidden,
    relation_matrices,
    split_relation_heads,
)


def test_positions_turn_one_half_of_a_head_against_the_other() -> None:
    """As complex numbers: components i and i + r/2 of a head are one, turned by the angle of its position."""
    draw = torch.Generator().manual_seed(3)
    head_width, rotated, positions = 10, 6, 7
    angle_Tr = torch.rand(positions, rotated // 2, generator=draw).mul(6).repeat(1, 2)
    replay = Replay(head_width=head_width, cosine_Tr=angle_Tr.cos(), sine_Tr=angle_Tr.sin())
    assert replay.rotated == rotated
    vectors_BTD = torch.randn(2, 5, 3 * head_width, generator=draw)
    position_BT = torch.tensor([[0, 1, 2, 0, 1], [6, 6, 3, 4, 5]])
    have_BTD = replay.turn(vectors_BTD, position_BT)
    want_BTD = vectors_BTD.double().clone()
    for row in range(2):
        for token in range(5):
            for head in range(3):
                for pair in range(rotated // 2):
                    first, second = head * head_width + pair, head * head_width + pair + rotated // 2
                    number = complex(vectors_BTD[row, token, first], vectors_BTD[row, token, second])
                    turned = number * cmath.exp(1j * float(angle_Tr[position_BT[row, token], pair]))
                    want_BTD[row, token, first], want_BTD[row, token, second] = turned.real, turned.imag
    torch.testing.assert_close(have_BTD.double(), want_BTD, rtol=0, atol=1e-5)
    untouched = vectors_BTD.unflatten(-1, (3, head_width))[..., rotated:]
    assert torch.equal(have_BTD.unflatten(-1, (3, head_width))[..., rotated:], untouched)


def plain_relations(vectors_TD: torch.Tensor, heads: int, length: int) -> list[list[list[float]]]:
    """softmax(x x^T / sqrt(d)) of each head among the first `length` positions, one number at a time."""
    rows, width = vectors_TD.double().tolist(), vectors_TD.shape[1] // heads
    found = []
    for head in range(heads):
        parts = [row[head * width : (head + 1) * width] for row in rows[:length]]
        matrix = []
        for one in parts:
            powers = [
                math.exp(sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(width)) for other in parts
            ]
            matrix.append([power / sum(powers) for power in powers])
        found.append(matrix)
    return found


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_relations_are_the_softmax_among_real_positions(heads: int) -> None:
    vectors_BTD = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(heads))
    length_B = torch.tensor([5, 1, 3])
    real_BT = torch.arange(5) < length_B[:, None]
    before = vectors_BTD.clone()
    matrices_BATT = relation_matrices(vectors_BTD, heads, real_BT)
    assert matrices_BATT.shape == (3, heads, 5, 5) and matrices_BATT.dtype == torch.float32
    for row, length in enumerate(length_B.tolist()):
        want = torch.zeros(heads, 5, 5, dtype=torch.float64)
        want[:, :length, :length] = torch.tensor(plain_relations(vectors_BTD[row], heads, length))
        assert torch.allclose(matrices_BATT[row].double(), want, atol=1e-6)
    assert torch.equal(vectors_BTD, before), "what is given stays as it is"


def test_what_stands_at_padding_changes_no_relation() -> None:
    """Not even what is not a number."""
    vectors_BTD = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    real_BT = torch.tensor([[True, True, False, False]])
    want = relation_matrices(vectors_BTD, 2, real_BT)
    vectors_BTD[:, 2:] = torch.tensor([[1e30], [float("nan")]])
    have = relation_matrices(vectors_BTD, 2, real_BT)
    assert torch.equal(have, want)


@given(rows=st.integers(1, 3), positions=st.integers(1, 4), heads=st.integers(1, 4), width=st.integers(1, 4))
def test_heads_are_neighbouring_components(rows: int, positions: int, heads: int, width: int) -> None:
    vectors_BTD = torch.arange(rows * positions * heads * width).view(rows, positions, heads * width)
    split_BATd = split_relation_heads(vectors_BTD, heads)
    assert split_BATd.shape == (rows, heads, positions, width)
    for head, part_BTd in enumerate(vectors_BTD.split(width, dim=2)):
        assert torch.equal(split_BATd[:, head], part_BTd)


@pytest.mark.parametrize("heads", [0, -1, 4, 7])
def test_heads_of_different_sizes_are_refused(heads: int) -> None:
    with pytest.raises(SettingsError, match=f"{heads} relation heads do not divide the width 6.*common divisors"):
        split_relation_heads(torch.zeros(1, 2, 6), heads)


def test_projections_are_plain_linear_maps_and_move_between_devices() -> None:
    draw = torch.Generator().manual_seed(2)
    maps = {
        name: Projection(weight=torch.randn(4, 3, generator=draw), bias=torch.randn(4, generator=draw))
        for name in VECTORS
    }
    hidden_BTD = torch.randn(2, 5, 3, generator=draw)
    projections = AttentionProjections(**maps)
    vectors = project_hidden(hidden_BTD, projections)
    for name, one in maps.items():
        want = torch.tensor(
            [
                [
                    [
                        sum(w * h for w, h in zip(row, token, strict=True)) + b
                        for row, b in zip(one.weight.tolist(), one.bias.tolist(), strict=True)
                    ]
                    for token in tokens
                ]
                for tokens in hidden_BTD.double().tolist()
            ]
        )
        assert torch.allclose(getattr(vectors, f"{name}_BTD"), want, atol=1e-5)
    moved = projections.to("meta")
    assert all(getattr(moved, name).weight.is_meta and getattr(moved, name).bias.is_meta for name in VECTORS)
    assert not projections.query.weight.is_meta
