"""The chunked relation loss against the materialised one in float64, on random vectors and tiles of many sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train.kernels import chunked
from student_train.kernels.chunked import chunked_kl_sum
from student_train.kernels.reference import reference_kl_sum

RAGGED = torch.tensor([9, 1, 6])


# tiles: one row of one matrix, rows that do not divide T, several matrices at once, several rows of the batch at once
@pytest.mark.parametrize("tile_elements", [1, 9 * 4, 9 * 9 * 4, 1 << 20])
@pytest.mark.parametrize("length_B", [None, RAGGED, torch.tensor([9, 9, 0])])
def test_every_tiling_gives_the_same(tile_elements: int, length_B: Any, vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    value, gradient = value_and_gradient(chunked_kl_sum, teacher, student, length_B, tile_elements=tile_elements)
    expected, expected_gradient = value_and_gradient(reference_kl_sum, teacher, student, length_B)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


# odd lengths: bands that do not divide a piece, pieces of one position, tiles of one row, cut and masked ones
@pytest.mark.parametrize("positions", [1, 37, 101])
@pytest.mark.parametrize("tile_elements", [1, 37 * 4, 1 << 12, 1 << 20])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_tilings_give_the_same(
    positions: int, tile_elements: int, segmented: bool, causal: bool, vectors, value_and_gradient
) -> None:
    teacher, student = vectors(positions=positions)
    starts_BT = None
    if segmented:
        starts_BT = torch.rand((3, positions), generator=torch.Generator().manual_seed(3)) < 0.1
        starts_BT[:, 0] = True
        starts_BT[2] = starts_BT[1]
    mask = {"causal": causal, "starts_BT": starts_BT}
    for length_B in (None, torch.tensor([positions, positions // 3, positions // 3])):
        expected = value_and_gradient(reference_kl_sum, teacher, student, length_B, **mask)
        found = value_and_gradient(chunked_kl_sum, teacher, student, length_B, tile_elements=tile_elements, **mask)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_accuracy_of_a_causal_mask(
    dtype: torch.dtype, tolerance: float, vectors, value_and_gradient, relative_error
) -> None:
    teacher, student = (v.to(dtype) for v in vectors(positions=131, teacher_width=18, student_width=12, scale=0.8))
    length_B = torch.tensor([131, 5, 100])
    starts_BT = torch.zeros(3, 131, dtype=torch.bool)
    starts_BT[:, [0, 50, 99]] = True
    mask = {"causal": True, "starts_BT": starts_BT}
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B, **mask)
    found = value_and_gradient(chunked_kl_sum, teacher, student, length_B, **mask)
    assert relative_error(found[0], expected[0]) <= 1e-5
    assert relative_error(found[1], expected[1]) <= tolerance


def test_a_causal_mask_visits_little_more_than_half_of_the_pairs() -> None:
    for positions in (64, 511, 512, 1000):
        tiles = list(chunked._tiles(torch.Size([1, 3, positions, 4]), [((0, positions),)], 1 << 18, causal=True))
        pairs = sum(math.prod(part.stop - part.start for part in tile) for tile in tiles)
        assert pairs / (3 * positions**2) < (0.76 if positions == 64 else 0.57)
        rows = sum((tile.matrices.stop - tile.matrices.start) * (tile.rows.stop - tile.rows.start) for tile in tiles)
        assert rows == 3 * positions and all(tile.columns == slice(0, tile.rows.stop) for tile in tiles)


@pytest.mark.parametrize("tile_elements", [7 * 2, 1 << 20])
def test_gradcheck(tile_elements: int, vectors) -> None:
    teacher, student = vectors(batch=2, positions=7)
    length_B = torch.tensor([7, 4])

    def loss(student: Tensor) -> Tensor:
        return chunked_kl_sum(teacher, student, length_B, tile_elements=tile_elements)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize(("teacher_width", "student_width"), [(4, 128), (16, 12), (64, 32), (128, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)],
)
def test_accuracy_by_width_and_type(
    teacher_width: int, student_width: int, dtype: torch.dtype, tolerance: float, vectors, value_and_gradient,
    relative_error,
) -> None:  # fmt: skip
    teacher, student = vectors(positions=37, teacher_width=teacher_width, student_width=student_width, scale=0.8)
    teacher, student = teacher.to(dtype), student.to(dtype)
    length_B = torch.tensor([37, 5, 20])
    # the same rounded inputs in float64, so that only arithmetic is judged
    expected, expected_gradient = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    for tile_elements in (37 * 5, 1 << 20):
        value, gradient = value_and_gradient(chunked_kl_sum, teacher, student, length_B, tile_elements=tile_elements)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        assert relative_error(value, expected) <= min(tolerance, 1e-5)
        # a half-precision gradient is rounded once, at the end
        assert relative_error(gradient, expected_gradient) <= tolerance


# matrices cut to their lengths, and masked
@pytest.mark.parametrize("tile_elements", [9, 1 << 20])
@pytest.mark.parametrize("garbage", [1e30, math.nan])
def test_padding_may_hold_any_number(tile_elements: int, garbage: float, vectors, value_and_gradient) -> None:
    teacher, student = (v.float() for v in vectors())
    expected = value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, tile_elements=tile_elements)
    starts_BT = torch.zeros(3, 9, dtype=torch.bool)
    starts_BT[:, [0, 4]] = True
    mask = {"causal": True, "starts_BT": starts_BT, "tile_elements": tile_elements}
    expected += value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, **mask)
    for v in (teacher, student):
        v[1, :, 1:], v[2, :, 6:] = garbage, -garbage
    found = value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, tile_elements=tile_elements)
    found += value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, **mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_long_rows(vectors, value_and_gradient, relative_error) -> None:
    """8,192 positions: the loss from blocks of rows in float64, the gradient at a few positions."""
    teacher, student = vectors(batch=1, heads=1, positions=8192, teacher_width=4, student_width=4, scale=1.0)
    length = 5000
    value, gradient = value_and_gradient(chunked_kl_sum, teacher.float(), student.float(), torch.tensor([length]))
    vectors_Td = [v[0, 0, :length] for v in (teacher.float().double(), student.float().double())]
    lse_T, total = [torch.empty(length, dtype=torch.float64) for _ in vectors_Td], 0.0
    for rows in torch.arange(length).split(1000):
        logs = []
        for v_Td, lse in zip(vectors_Td, lse_T, strict=True):
            logits = v_Td[rows] @ v_Td.T / 2
            lse[rows] = logits.logsumexp(1)
            logs.append(logits.sub_(lse[rows, None]))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
    assert float(value) == pytest.approx(total, rel=1e-5)
    some = torch.tensor([0, 4321, length - 1])
    (p, q) = (
        (v_Td[some] @ v_Td.T / 2, lse[some, None], lse[None]) for v_Td, lse in zip(vectors_Td, lse_T, strict=True)
    )
    weights = (q[0] - q[1]).exp() + (q[0] - q[2]).exp() - (p[0] - p[1]).exp() - (p[0] - p[2]).exp()
    assert relative_error(gradient[0, 0, some], weights @ vectors_Td[1] / 2) < 1e-5
    assert not gradient[0, 0, length:].any()


def test_repeats_exactly(vectors, value_and_gradient) -> None:
    teacher, student = vectors(positions=65)
    first, second = (
        value_and_gradient(chunked_kl_sum, teacher.float(), student.float(), None, tile_elements=65 * 7)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_nothing_comes_from_uninitialised_memory(vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    expected = value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, tile_elements=40)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        assert torch.empty(1).isnan()
        found = value_and_gradient(chunked_kl_sum, teacher, student, RAGGED, tile_elements=40)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_keeps_no_relation_matrix(monkeypatch: pytest.MonkeyPatch, vectors) -> None:
    teacher, student = vectors(batch=1, heads=1, positions=257, teacher_width=4, student_width=4)
    student.requires_grad_()
    kept: list[Tensor] = []
    created: list[int] = []
    original = chunked._logits

    def logits(*args: Any, **options: Any) -> Tensor:
        tile = original(*args, **options)
        created.append(tile.numel())
        return tile

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(chunked, "_logits", logits)
    length = 200
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_kl_sum(teacher, student, torch.tensor([length]), tile_elements=257 * 16).backward()
    assert sum(tensor.numel() for tensor in kept) < 257 * 32
    # two models, two passes, every pair of real positions once in each
    assert max(created) <= 257 * 16 and sum(created) == 4 * length**2


def test_neighbouring_rows_of_equal_length_share_tiles() -> None:
    tiles = list(chunked._tiles(torch.Size([5, 3, 8, 4]), [((0, n),) for n in (8, 8, 0, 5, 5)], 8 * 8 * 4))
    sizes = [tuple(part.stop - part.start for part in tile) for tile in tiles]
    assert sizes == [(4, 8, 8), (2, 8, 8), (6, 5, 5)]
    assert sum(math.prod(size) for size in sizes) == 3 * (2 * 64 + 2 * 25)
