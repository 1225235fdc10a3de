"""The Triton kernels against the materialised loss in float64: on a GPU, or in Triton's interpreter without one.

The interpreter multiplies bfloat16 wrongly, so that type needs a GPU. What the interpreter takes but the compiler
refuses is found by compiling for GPUs that need not be there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student_train.kernels import relation_kl, relation_kl_sum
from student_train.kernels.reference import reference_kl_sum

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kdcache[triton]'")

from student_train.kernels.fused import Tiling, fused_kl_sum, segment_ranges

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and TRITON_INTERPRET=1 is not set"
)
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="no GPU")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]


def on_device(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [tensor.to(device=DEVICE, dtype=dtype) for tensor in tensors]


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize(("teacher_width", "student_width"), [(4, 128), (16, 12), (80, 32), (128, 4)])
@pytest.mark.parametrize("dtype", TYPES)
def test_accuracy_by_width_and_type(
    teacher_width: int, student_width: int, dtype: torch.dtype, vectors, value_and_gradient, relative_error
) -> None:
    widths = {"teacher_width": teacher_width, "student_width": student_width}
    teacher, student = on_device(*vectors(batch=2, positions=70, scale=0.8, **widths), dtype=dtype)
    for length_B in (None, lengths(1, 66)):
        # the same rounded inputs in float64, so that only arithmetic is judged
        expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
        value, gradient = value_and_gradient(fused_kl_sum, teacher, student, length_B)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert relative_error(value, expected[0]) <= 1e-5
        assert relative_error(gradient, expected[1]) <= TOLERANCE[dtype]
        # no copy on the way back into the projections: heads are a view of the concatenated ones
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 16), (16, 64), (128, 32)])
def test_every_tiling_gives_the_same(rows: int, columns: int, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors(positions=37))
    length_B = lengths(37, 16, 0)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    found = value_and_gradient(fused_kl_sum, teacher, student, length_B, tiling=Tiling(rows=rows, columns=columns))
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-6


def some_starts(positions: int, rows: int = 3) -> Tensor:
    starts_BT = torch.rand((rows, positions), generator=torch.Generator().manual_seed(5)) < 0.08
    starts_BT[:, 0] = True
    return starts_BT.to(DEVICE)


# odd lengths: segments within a tile, over several, and tiles that no row of a program sees
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_in_every_tiling(
    rows: int, columns: int, segmented: bool, causal: bool, vectors, value_and_gradient, relative_error
) -> None:
    tiling = Tiling(rows=rows, columns=columns)
    for positions, length_B in ((1, None), (67, None), (67, lengths(67, 16, 0))):
        teacher, student = on_device(*vectors(positions=positions))
        mask = {"causal": causal, "starts_BT": some_starts(positions) if segmented else None}
        expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B, **mask)
        found = value_and_gradient(fused_kl_sum, teacher, student, length_B, tiling=tiling, **mask)
        if positions == 1:
            # each position is related to itself alone, with certainty
            assert abs(float(found[0])) < 1e-5 and float(found[1].abs().max()) < 1e-5
            continue
        assert relative_error(found[0], expected[0]) < 1e-5
        assert relative_error(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("segmented", [False, True])
def test_large_logits_under_a_causal_mask(segmented: bool, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors(batch=2, positions=40, teacher_width=16, student_width=16, scale=6.0))
    # what is not seen is larger still, so that its exponential is infinite
    for v in (teacher, student):
        v[:, :, 33:] *= 30
    mask = {"causal": True, "starts_BT": some_starts(40, 2) if segmented else None}
    length_B = lengths(33, 40)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B, **mask)
    value, gradient = value_and_gradient(fused_kl_sum, teacher, student, length_B, **mask)
    assert torch.isfinite(gradient).all() and not gradient[0, :, 33:].any()
    assert relative_error(value, expected[0]) < 1e-3
    assert relative_error(gradient, expected[1]) < 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_masked_nothing_comes_from_uninitialised_memory_or_padding(causal: bool, vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors(positions=70))
    length_B, mask = lengths(70, 0, 3), {"causal": causal, "starts_BT": some_starts(70)}
    expected = value_and_gradient(fused_kl_sum, teacher, student, length_B, **mask)
    for v in (teacher, student):
        v[1], v[2, :, 3:] = math.nan, math.inf
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        found = value_and_gradient(fused_kl_sum, teacher, student, length_B, **mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_segments_begin_and_end_where_they_are_said_to() -> None:
    starts_BT = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    begin_BT, end_BT = segment_ranges(starts_BT, torch.tensor([5, 4]))
    assert begin_BT.tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 2, 2, 2, 5]]
    assert end_BT.tolist() == [[3, 3, 3, 4, 5, 5], [2, 2, 4, 4, 4, 4]]


# log-sum-exps in powers of two: below 100 two exponentials give both directions, above four are taken
@pytest.mark.parametrize("largest_lse", [95, 105, 1e4 / math.log(2)])
def test_large_logits(largest_lse: float, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = vectors(batch=2, positions=20, teacher_width=16, student_width=16, scale=1.0)
    teacher, student = (
        v * math.sqrt(largest_lse * math.log(2) / float((v.square().sum(-1) / 4).max())) for v in (teacher, student)
    )
    teacher, student = on_device(teacher, student)
    teacher[0, :, 15:] *= 100
    student[0, :, 15:] *= 100
    length_B = lengths(15, 20)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    value, gradient = value_and_gradient(fused_kl_sum, teacher, student, length_B)
    assert torch.isfinite(gradient).all() and not gradient[0, :, 15:].any()
    # a float32 logit of 1e4 is known to 1e-3, and so is its exponential
    tolerance = max(1e-5, largest_lse * 1e-6)
    assert relative_error(value, expected[0]) < tolerance
    assert relative_error(gradient, expected[1]) < tolerance


def test_both_ways_of_the_backward_pass_agree(vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors(batch=1, positions=20))
    _, gradient = value_and_gradient(fused_kl_sum, teacher, student)
    # one matrix of the two is steep now, the other is what it was
    steep = teacher.clone()
    steep[:, 1] *= 30
    _, changed = value_and_gradient(fused_kl_sum, steep, student)
    assert torch.equal(gradient[:, 0], changed[:, 0]) and not torch.equal(gradient[:, 1], changed[:, 1])
    _, expected = value_and_gradient(reference_kl_sum, steep.double(), student.double())
    assert relative_error(changed, expected) < 1e-5


def test_nothing_comes_from_uninitialised_memory_or_padding(vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors(positions=70))
    length_B = lengths(70, 0, 3)
    expected = value_and_gradient(fused_kl_sum, teacher, student, length_B)
    for v in (teacher, student):
        v[1], v[2, :, 3:] = math.nan, math.inf
    fill = torch.utils.deterministic.fill_uninitialized_memory
    assert fill
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        found = value_and_gradient(fused_kl_sum, teacher, student, length_B)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_any_layout_of_the_vectors(vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors())
    expected = value_and_gradient(fused_kl_sum, teacher, student)
    for other in (teacher.contiguous(), teacher.transpose(2, 3).contiguous().transpose(2, 3)):
        found = value_and_gradient(fused_kl_sum, other, student.contiguous(), lengths(9, 0, 9, 0, 9)[::2])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_float32_teacher_of_a_half_precision_student(vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors())
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.half().double())
    found = value_and_gradient(fused_kl_sum, teacher, student.half())
    assert relative_error(found[0], expected[0]) < 1e-3
    assert relative_error(found[1], expected[1]) < 1e-3


def test_float16_keeps_small_differences_of_small_weights(vectors, value_and_gradient, relative_error) -> None:
    teacher, _ = on_device(*vectors(batch=1, heads=1, positions=200, teacher_width=16, scale=0.2), dtype=torch.float16)
    student = teacher * (1 + 0.02 * torch.linspace(-1, 1, 200, device=DEVICE)[:, None]).half()

    def scaled(function, *args):
        # as fp16 training does, so that the gradient itself is not too small
        return 1024 * function(*args)

    _, expected = value_and_gradient(lambda *args: scaled(reference_kl_sum, *args), teacher.double(), student.double())
    _, gradient = value_and_gradient(lambda *args: scaled(fused_kl_sum, *args), teacher, student)
    assert relative_error(gradient, expected) < 5e-4


def test_the_gradient_is_scaled_on_the_device_and_the_students_alone(vectors) -> None:
    teacher, student = (v.requires_grad_() for v in on_device(*vectors()))
    fused_kl_sum(teacher, student).backward()
    assert teacher.grad is None and student.grad is not None
    once, student.grad = student.grad, None
    (fused_kl_sum(teacher, student) * 8).backward()
    assert torch.equal(student.grad, 8 * once)


def test_sum_and_mean_by_name(vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors())
    length_B = lengths(9, 2, 5)
    total = relation_kl_sum(teacher, student, length_B, backend="triton")
    torch.testing.assert_close(total, relation_kl_sum(teacher, student, length_B, backend="chunked"))
    torch.testing.assert_close(relation_kl(teacher, student, length_B, backend="triton"), total / 16)


def test_repeats_exactly(vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors(positions=65))
    first, second = (value_and_gradient(fused_kl_sum, teacher, student) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_in_little_memory_without_the_host(dtype, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors(batch=1, positions=8192, teacher_width=16, student_width=12), dtype=dtype)
    length_B = lengths(8000)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    value_and_gradient(fused_kl_sum, teacher, student, length_B)  # compiled
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = value_and_gradient(relation_kl_sum, teacher, student, length_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # far below one matrix of 256 MiB
    assert torch.cuda.max_memory_allocated() - before < 8 << 20
    assert relative_error(2 * found[0], expected[0]) <= 1e-5
    assert relative_error(2 * found[1], expected[1]) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("masks", "of_backward"), [((), [2, 4]), (("causal",), [2]), (("segments",), [2, 4]), (("causal", "segments"), [2])]
)
def test_machine_code(masks: tuple[str, ...], of_backward: list[int], tmp_path: Path) -> None:
    """Compiled for a GPU of capability 9.0: all in registers, and as many exponentials per pair as intended."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script), "90", "bfloat16,float32", "16", "12", *masks],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    codes = [json.loads(line) for line in result.stdout.splitlines()]
    for forward, backward in zip(codes[::2], codes[1::2], strict=True):
        assert forward["stack"] == backward["stack"] == 0
        # two, and one for each row of the tile
        assert [math.floor(count) for count in forward["exponentials"]] == [2]
        assert backward["exponentials"] == of_backward
