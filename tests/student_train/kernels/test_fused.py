"""The Triton kernels against the materialised loss in float64: on a GPU, or in Triton's interpreter without one.

The interpreter multiplies bfloat16 wrongly, so that type needs a GPU. What the interpreter takes but the compiler
refuses is found by compiling for GPUs that need not be there.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train.kernels import relation_kl, relation_kl_sum
from student_train.kernels.reference import reference_kl_sum

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kdcache[triton]'")

from student_train.kernels.fused import SYMMETRIC_FROM, Plan, Tiling, choose_plan, fused_kl_sum, segment_ranges

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and TRITON_INTERPRET=1 is not set"
)
# compiling takes seconds a kernel: a few of them here, all in `make test-machine-code`
ALL_MACHINE_CODE = os.environ.get("KDCACHE_MACHINE_CODE") == "all"
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="no GPU")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]


def on_device(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [tensor.to(device=DEVICE, dtype=dtype) for tensor in tensors]


def plan_of(rows: int, columns: int, *, symmetric: bool = False) -> Plan:
    tiling = Tiling(rows=rows, columns=columns)
    return Plan(forward=tiling, backward=tiling, symmetric=symmetric)


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


@pytest.mark.parametrize(
    ("rows", "columns", "symmetric"),
    [(16, 16, False), (32, 16, True), (16, 64, False), (128, 32, False), (16, 16, True), (64, 64, True)],
)
def test_every_tiling_gives_the_same(
    rows: int, columns: int, symmetric: bool, vectors, value_and_gradient, relative_error
) -> None:
    teacher, student = on_device(*vectors(positions=37))
    length_B = lengths(37, 16, 0)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    plan = plan_of(rows, columns, symmetric=symmetric)
    found = value_and_gradient(fused_kl_sum, teacher, student, length_B, plan=plan)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-6


def some_starts(positions: int, rows: int = 3) -> Tensor:
    starts_BT = torch.rand((rows, positions), generator=torch.Generator().manual_seed(5)) < 0.08
    starts_BT[:, 0] = True
    return starts_BT.to(DEVICE)


# odd lengths: segments within a tile, over several, and tiles that no row of a program sees
@pytest.mark.parametrize(("rows", "columns", "symmetric"), [(32, 16, False), (16, 64, False), (32, 16, True)])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_in_every_tiling(
    rows: int, columns: int, symmetric: bool, segmented: bool, causal: bool, vectors, value_and_gradient, relative_error
) -> None:
    plan = plan_of(rows, columns, symmetric=symmetric)
    for positions, length_B in ((1, None), (67, None), (67, lengths(67, 16, 0))):
        teacher, student = on_device(*vectors(heads=1, positions=positions))
        mask = {"causal": causal, "starts_BT": some_starts(positions) if segmented else None}
        expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B, **mask)
        found = value_and_gradient(fused_kl_sum, teacher, student, length_B, plan=plan, **mask)
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


@pytest.mark.parametrize(("causal", "symmetric"), [(False, False), (True, False), (True, True)])
def test_masked_nothing_comes_from_uninitialised_memory_or_padding(
    causal: bool, symmetric: bool, vectors, value_and_gradient
) -> None:
    teacher, student = on_device(*vectors(positions=70))
    length_B, mask = lengths(70, 0, 3), {"causal": causal, "starts_BT": some_starts(70)}
    mask["plan"] = plan_of(32, 32, symmetric=symmetric)
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


# log-sum-exps in powers of two: below 100 two exponentials give both directions of the gradient, above four are taken;
# sums of plain exponentials overflow from 128 on, and a little earlier that of the logits times these
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("largest_lse", [95, 105, 125, 131, 1e4 / math.log(2)])
def test_large_logits(largest_lse: float, symmetric: bool, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = vectors(batch=2, positions=20, teacher_width=16, student_width=16, scale=1.0)
    teacher, student = (
        v * math.sqrt(largest_lse * math.log(2) / float((v.square().sum(-1) / 4).max())) for v in (teacher, student)
    )
    teacher, student = on_device(teacher, student)
    teacher[0, :, 15:] *= 100
    student[0, :, 15:] *= 100
    length_B = lengths(15, 20)
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.double(), length_B)
    plan = plan_of(16, 16, symmetric=symmetric)
    value, gradient = value_and_gradient(fused_kl_sum, teacher, student, length_B, plan=plan)
    assert torch.isfinite(gradient).all() and not gradient[0, :, 15:].any()
    # a float32 logit of 1e4 is known to 1e-3, and so is its exponential
    tolerance = max(1e-5, largest_lse * 1e-6)
    assert relative_error(value, expected[0]) < tolerance
    assert relative_error(gradient, expected[1]) < tolerance


# the bound of sums without a largest logit: no sum is right that is not finite, and every one that is finite is right
@pytest.mark.parametrize("steep_row", [0, 19])
def test_sums_that_overflow_are_taken_again_with_the_largest_logit(
    steep_row: int, vectors, value_and_gradient, relative_error
) -> None:
    teacher, student = on_device(
        *vectors(batch=1, heads=1, positions=20, teacher_width=16, student_width=16, scale=0.5)
    )
    plan = plan_of(16, 16)
    gentle, _ = value_and_gradient(fused_kl_sum, teacher, student, plan=plan)
    assert relative_error(gentle, reference_kl_sum(teacher.double(), student.double())) < 1e-5
    for lse, tolerance in ((120.0, 1e-5), (127.9, 1e-5), (128.1, 1e-5), (300.0, 1e-4)):
        for steep in ("teacher", "student"):
            pair = {"teacher": teacher.clone(), "student": student.clone()}
            row = pair[steep][0, 0, steep_row]
            row *= math.sqrt(lse * math.log(2) * 4) / float(row.norm())
            expected = reference_kl_sum(pair["teacher"].double(), pair["student"].double())
            found = fused_kl_sum(pair["teacher"], pair["student"], plan=plan)
            assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("symmetric", [False, True])
def test_gentle_and_steep_matrices_agree(symmetric: bool, vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors(batch=1, positions=20))
    plan = plan_of(16, 16, symmetric=symmetric)
    _, gradient = value_and_gradient(fused_kl_sum, teacher, student, plan=plan)
    # one matrix of the two is steep now, the other is what it was
    steep = teacher.clone()
    steep[:, 1] *= 30
    _, changed = value_and_gradient(fused_kl_sum, steep, student, plan=plan)
    assert torch.equal(gradient[:, 0], changed[:, 0]) and not torch.equal(gradient[:, 1], changed[:, 1])
    _, expected = value_and_gradient(reference_kl_sum, steep.double(), student.double())
    assert relative_error(changed, expected) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_comes_from_uninitialised_memory_or_padding(symmetric: bool, vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors(positions=70))
    length_B, plan = lengths(70, 0, 3), plan_of(32, 32, symmetric=symmetric)
    expected = value_and_gradient(fused_kl_sum, teacher, student, length_B, plan=plan)
    for v in (teacher, student):
        v[1], v[2, :, 3:] = math.nan, math.inf
    fill = torch.utils.deterministic.fill_uninitialized_memory
    assert fill
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        found = value_and_gradient(fused_kl_sum, teacher, student, length_B, plan=plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_any_layout_of_the_vectors(vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors())
    expected = value_and_gradient(fused_kl_sum, teacher, student)
    # so that no more than one component may be read at once: heads that begin anywhere in a wider row
    cut = torch.zeros(3, 9, 2, 11, device=DEVICE)[..., 3:].transpose(1, 2)
    cut.copy_(teacher)
    for other in (teacher.contiguous(), teacher.transpose(2, 3).contiguous().transpose(2, 3), cut):
        found = value_and_gradient(fused_kl_sum, other, student.contiguous(), lengths(9, 0, 9, 0, 9)[::2])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_float32_teacher_of_a_half_precision_student(vectors, value_and_gradient, relative_error) -> None:
    teacher, student = on_device(*vectors())
    expected = value_and_gradient(reference_kl_sum, teacher.double(), student.half().double())
    found = value_and_gradient(fused_kl_sum, teacher, student.half())
    assert relative_error(found[0], expected[0]) < 1e-3
    assert relative_error(found[1], expected[1]) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_float16_keeps_small_differences_of_small_weights(
    symmetric: bool, vectors, value_and_gradient, relative_error
) -> None:
    teacher, _ = on_device(*vectors(batch=1, heads=1, positions=200, teacher_width=16, scale=0.2), dtype=torch.float16)
    student = teacher * (1 + 0.02 * torch.linspace(-1, 1, 200, device=DEVICE)[:, None]).half()

    def scaled(function, *args):
        # as fp16 training does, so that the gradient itself is not too small
        return 1024 * function(*args)

    _, expected = value_and_gradient(lambda *args: scaled(reference_kl_sum, *args), teacher.double(), student.double())
    plan = plan_of(64, 64, symmetric=symmetric)
    fused = functools.partial(fused_kl_sum, plan=plan)
    _, gradient = value_and_gradient(lambda *args: scaled(fused, *args), teacher, student)
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


# in the interpreter programs and their parts follow one another anyway: what may differ is on a GPU
@NEEDS_GPU
@pytest.mark.parametrize("symmetric", [False, True])
def test_repeats_exactly(symmetric: bool, vectors, value_and_gradient) -> None:
    teacher, student = on_device(*vectors(positions=300))
    plan = plan_of(64, 64, symmetric=symmetric)
    first, *others = (value_and_gradient(fused_kl_sum, teacher, student, plan=plan) for _ in range(9))
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def test_many_matrices_are_taken_one_by_one_and_few_in_parts() -> None:
    for matrices, symmetric in ((SYMMETRIC_FROM - 1, False), (SYMMETRIC_FROM, True)):
        for dtype in (torch.float32, torch.bfloat16):
            for width in (4, 24, 64, 128):
                plan = choose_plan(matrices, width, width, dtype)
                assert plan.symmetric == symmetric
                assert not symmetric or plan.backward.rows % plan.backward.columns == 0


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


# the most instructions per pair, of each kernel, on the path of unmasked tiles of gentle matrices; the symmetric pass
# computes unordered pairs
MACHINE_CODE = [
    ("90", "24/24", {"forward": 13.0, "symmetric": 16.0, "rows": 16.5}),
    ("80", "16/12", {"forward": 15.0, "symmetric": 18.0, "rows": 16.5}),
    ("90", "16/12", {"forward": 13.0, "symmetric": 15.0, "rows": 16.5}),
    ("90", "32/24", {"forward": 13.5, "symmetric": 16.5, "rows": 16.5}),
    ("90", "64/64", {"forward": 14.5, "symmetric": 19.5, "rows": 18.5}),
    ("80", "24/24", {"forward": 16.5, "symmetric": 20.0, "rows": 17.0}),
    ("80", "32/24", {"forward": 17.0, "symmetric": 20.0, "rows": 17.0}),
    ("80", "64/64", {"forward": 20.0, "symmetric": 27.0, "rows": 22.0}),
]


def compiled(tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    codes = [json.loads(line) for line in result.stdout.splitlines()]
    return {code["kernel"]: code for code in codes}


@pytest.mark.parametrize(("capability", "widths", "most"), MACHINE_CODE if ALL_MACHINE_CODE else MACHINE_CODE[:1])
def test_machine_code(capability: str, widths: str, most: dict[str, float], tmp_path: Path) -> None:
    """For GPUs that are not here: all in registers, several components read at once, few instructions."""
    codes = compiled(tmp_path, capability, "float32", "bfloat16", widths)
    for name, code in codes.items():
        assert code["stack"] == code["spilled"] == 0, name
        fewest = [low for low, _ in code["instructions"]]
        exponentials = code["exponentials"]
        if name == "forward":
            # without and with the largest logit: two, and in the latter one for each row of the tile
            assert len(fewest) == 2 and fewest[0] <= most[name]
            assert exponentials[0] == [2, 2] and exponentials[1][1] <= 2.3
        else:
            # two in gentle matrices, four in the others; in the symmetric pass those are of both directions of a pair
            assert exponentials == [[2, 4]] * (2 if name == "symmetric" else 1)
            assert max(fewest) <= most[name], name
        # asynchronous copies in the loops, nothing read component by component
        assert any(read.startswith("LDGSTS") and read.endswith(("64", "128")) for read in code["reads"]), code["reads"]


@pytest.mark.parametrize("capability", ["90", "80"] if ALL_MACHINE_CODE else ["80"])
@pytest.mark.parametrize(
    "masks", [["causal"], ["segments"], ["causal", "segments"]] if ALL_MACHINE_CODE else [["causal"]]
)
@pytest.mark.parametrize("widths", ["24/24", "64/64"] if ALL_MACHINE_CODE else ["16/12"])
def test_machine_code_of_masks(capability: str, masks: list[str], widths: str, tmp_path: Path) -> None:
    for name, code in compiled(tmp_path, capability, "float32", "bfloat16", widths, *masks).items():
        # up to six values wait outside the loops; with both masks the widest heads move some in a tile of 4,096 pairs
        most_spilled = 3 if (widths, len(masks), name) == ("64/64", 2, "symmetric") else 0
        assert code["spilled"] <= most_spilled and code["stack"] <= 24, name
        most = 2.3 if name == "forward" or "causal" in masks else 4
        assert max(high for _, high in code["exponentials"]) <= most


@pytest.mark.skipif(not ALL_MACHINE_CODE, reason="KDCACHE_MACHINE_CODE=all compiles for more types and widths")
@pytest.mark.parametrize("student", ["float32", "float16"])
def test_machine_code_of_other_types(student: str, tmp_path: Path) -> None:
    for widths in ("16/12", "32/32", "128/128"):
        for name, code in compiled(tmp_path, "90", "float32", student, widths).items():
            # a few values wait outside the loops where float32 factors fill the registers
            assert code["spilled"] == 0, (name, widths)
            assert code["stack"] <= (24 if student == "float32" else 0), (name, widths)
