"""The relation loss against the published formula in float64, written with loops over rows, heads and positions."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train import kernels
from student_train.kernels import relation_kl, relation_kl_sum, stored_relation_kl_sum
from teacher_cache.models.attention import relation_matrices

RAGGED = (9, 1, 6)
EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])


MASKS = pytest.mark.parametrize(
    ("causal", "starts"), [(True, None), (False, ((0, 4, 5), (0,), (0, 2, 8))), (True, ((0, 4, 5), (0,), (0, 2, 8)))]
)


def starts_of(starts: tuple[tuple[int, ...], ...] | None, positions: int = 9) -> Tensor | None:
    if starts is None:
        return None
    starts_BT = torch.zeros(len(starts), positions, dtype=torch.bool)
    for row, begins in enumerate(starts):
        starts_BT[row, list(begins)] = True
    return starts_BT


def kl_by_loops(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool = False,
    starts: tuple[tuple[int, ...], ...] | None = None,
) -> Tensor:
    """Sum of KL_i over real positions and mean over heads, in float64: one softmax at a time."""
    batch, heads, _, _ = student_BATd.shape
    rows = []
    for b in range(batch):
        for a in range(heads):
            for i in range(lengths[b]):
                begins = (0,) if starts is None else starts[b]
                first = max(begin for begin in begins if begin <= i)
                last = min([begin for begin in begins if begin > i] + [lengths[b]])
                related = range(first, min(last, lengths[b], i + 1 if causal else lengths[b]))
                logs = []
                for vectors_BATd in (teacher_BATd.double(), student_BATd.double()):
                    vectors_Td = vectors_BATd[b, a, : lengths[b]]
                    logits_T = torch.stack([vectors_Td[i] @ vectors_Td[j] for j in related])
                    logs.append((logits_T / math.sqrt(vectors_Td.shape[1])).log_softmax(0))
                rows.append((logs[0].exp() * (logs[0] - logs[1])).sum())
    return torch.stack(rows).sum() / heads


@EACH_BACKEND
def test_sum_and_mean_over_heads_and_real_positions(backend: Any, vectors) -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    expected = kl_by_loops(teacher, student, RAGGED)
    assert expected > 1
    total = relation_kl_sum(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    mean = relation_kl(teacher, student, length_B, backend=backend)
    torch.testing.assert_close(mean, expected / sum(RAGGED), rtol=1e-12, atol=0)
    everywhere = relation_kl(teacher, student, backend=backend)
    torch.testing.assert_close(everywhere, kl_by_loops(teacher, student, (9, 9, 9)) / 27, rtol=1e-12, atol=0)


@EACH_BACKEND
def test_gradient_of_the_loops(backend: Any, vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    _, expected = value_and_gradient(kl_by_loops, teacher, student, RAGGED)
    _, found = value_and_gradient(relation_kl_sum, teacher, student, torch.tensor(RAGGED), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert not found[1, :, 1:].any()


@EACH_BACKEND
@MASKS
def test_positions_that_are_left_out_are_not_in_the_softmax(
    backend: Any, causal: bool, starts: Any, vectors, value_and_gradient
) -> None:
    teacher, student = vectors()
    for lengths in (RAGGED, (9, 9, 9)):
        length_B = torch.tensor(lengths) if lengths == RAGGED else None
        mask = {"causal": causal, "starts_BT": starts_of(starts)}
        want = value_and_gradient(kl_by_loops, teacher, student, lengths, causal=causal, starts=starts)
        found = value_and_gradient(relation_kl_sum, teacher, student, length_B, backend=backend, **mask)
        torch.testing.assert_close(found[0], want[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], want[1], rtol=1e-10, atol=1e-13)
        without = relation_kl_sum(teacher, student, length_B, backend=backend)
        assert abs(float(without - found[0])) > 0.01 * float(without)
        mean = relation_kl(teacher, student, length_B, backend=backend, **mask)
        torch.testing.assert_close(mean, want[0] / sum(lengths), rtol=1e-12, atol=0)


@EACH_BACKEND
def test_a_causal_relation_does_not_see_what_comes_later(backend: Any, vectors) -> None:
    teacher, student = vectors(batch=1)
    starts_BT = starts_of(((0, 6),))
    changed_teacher, changed_student = teacher.clone(), student.clone()
    for v in (changed_teacher, changed_student):
        v[:, :, 5] *= 3
    values = []
    for both in ((teacher, student), (changed_teacher, changed_student)):
        first, last = torch.tensor([5]), torch.tensor([9])
        whole = relation_kl_sum(*both, last, causal=True, starts_BT=starts_BT, backend=backend)
        five = relation_kl_sum(*both, first, causal=True, starts_BT=starts_BT, backend=backend)
        six = relation_kl_sum(*both, torch.tensor([6]), causal=True, starts_BT=starts_BT, backend=backend)
        values.append((five, whole - six))
    # neither the positions before the changed one, nor those of the next segment
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_right(backend: Any, dtype: torch.dtype, vectors, value_and_gradient) -> None:
    teacher, student = vectors(positions=11, teacher_width=16, student_width=16, scale=1.0)
    largest = max(float((v @ v.transpose(-1, -2)).abs().max()) / 4 for v in (teacher, student))
    teacher, student = (v * math.sqrt(1e4 / largest) for v in (teacher, student))
    # padding holds anything, here numbers whose logits would drown all others
    for v in (teacher, student):
        v[1, :, 6:] *= 100
    teacher, student = teacher.to(dtype), student.to(dtype)
    length_B = torch.tensor([11, 6, 11])
    expected = kl_by_loops(teacher, student, (11, 6, 11))
    value, gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B, backend=backend)
    assert torch.isfinite(gradient).all()
    assert not gradient[1, :, 6:].any()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)


@EACH_BACKEND
def test_equal_vectors_cost_nothing_even_at_large_logits(backend: Any, vectors, value_and_gradient) -> None:
    teacher, _ = vectors(teacher_width=16, scale=40.0)
    teacher = teacher.float()
    value, gradient = value_and_gradient(relation_kl_sum, teacher, teacher.clone(), None, backend=backend)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-5


@EACH_BACKEND
def test_empty_rows_count_nothing(backend: Any, vectors, value_and_gradient) -> None:
    teacher, student = vectors()
    value, gradient = value_and_gradient(relation_kl_sum, teacher, student, torch.tensor([9, 0, 6]), backend=backend)
    torch.testing.assert_close(value, kl_by_loops(teacher, student, (9, 0, 6)), rtol=1e-12, atol=0)
    assert torch.isfinite(gradient).all() and not gradient[1].any()


@EACH_BACKEND
def test_only_the_student_gets_a_gradient(backend: Any, vectors) -> None:
    teacher, student = (v.requires_grad_() for v in (v.detach() for v in vectors()))
    relation_kl_sum(teacher, student, torch.tensor(RAGGED), backend=backend).backward()
    assert teacher.grad is None and student.grad is not None


def test_matrices_in_place_of_the_teachers_vectors(vectors, value_and_gradient, relative_error) -> None:
    teacher, student = vectors()
    length_B = torch.tensor(RAGGED)
    real_BT = torch.arange(9) < length_B[:, None]
    matrices_BATT = relation_matrices(teacher.transpose(1, 2).flatten(2), 2, real_BT)
    value, gradient = value_and_gradient(stored_relation_kl_sum, matrices_BATT.double(), student, length_B)
    want, want_gradient = value_and_gradient(relation_kl_sum, teacher, student, length_B)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert relative_error(gradient, want_gradient) < 1e-5
    halved, _ = value_and_gradient(stored_relation_kl_sum, matrices_BATT.half(), student, length_B)
    assert float(halved) == pytest.approx(float(want), rel=1e-3)
    # a distribution compared with itself, rounded: never below zero
    assert float(stored_relation_kl_sum(matrices_BATT.half(), teacher, length_B)) >= 0


@MASKS
def test_stored_matrices_are_masked_and_add_up_to_one_again(causal: bool, starts: Any, vectors, relative_error) -> None:
    teacher, student = vectors()
    length_B, starts_BT = torch.tensor(RAGGED), starts_of(starts)
    real_BT = torch.arange(9) < length_B[:, None]
    matrices_BATT = relation_matrices(teacher.transpose(1, 2).flatten(2), 2, real_BT)
    found = stored_relation_kl_sum(matrices_BATT, student, length_B, causal=causal, starts_BT=starts_BT)
    want = kl_by_loops(teacher, student, RAGGED, causal=causal, starts=starts)
    assert relative_error(found, want) < 1e-5


def test_different_heads_are_a_mistake(vectors) -> None:
    teacher, student = vectors()
    with pytest.raises(ValueError, match="same number of relation heads"):
        relation_kl(teacher[:, :1], student)


def test_what_the_gpu_kernels_cannot_take_is_said(vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = vectors()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the vectors are on 'cpu'"):
        relation_kl(teacher, student, backend="triton")
    pytest.importorskip("triton", reason="the other obstacles come after a missing Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="these vectors are float64"):
        relation_kl(teacher, student, backend="triton")
    teacher, student = vectors(teacher_width=129)
    with pytest.raises(ValueError, match="129 components are wider than 128"):
        relation_kl(teacher.float(), student.float(), backend="triton")


# a GPU is only said to be here: nothing is computed on it, but what Triton compiles before its first launch is real
WITHOUT_A_COMPILER = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.nvidia.driver import CudaDriver
from student_train.kernels import relation, relation_kl_sum

CudaDriver.is_active = staticmethod(lambda: True)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
relation.chunked_kl_sum = lambda teacher, student, length_B, **mask: print(mask) or torch.zeros(())
with FakeTensorMode():
    teacher, student = torch.randn(2, 3, 9, 8, device="cuda"), torch.randn(2, 3, 9, 5, device="cuda")
    for _ in range(2):
        relation_kl_sum(teacher, student, causal=True)
    try:
        relation_kl_sum(teacher, student, backend="triton")
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("compiler", ["none", "without the headers of Python"])
def test_where_triton_cannot_compile_the_chunked_backend_is_taken_and_said_so_once(
    compiler: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    # that there is no driver must not be what stops it
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    if compiler == "none":
        environment["PATH"] = str(tmp_path)
        reason = "Failed to find C compiler"
    else:
        if shutil.which("gcc") is None:
            pytest.skip("no gcc")
        bare = tmp_path / "bare-gcc"
        headers = sysconfig.get_paths()["include"]
        bare.write_text(f'#!/bin/sh\nexec gcc $(printf "%s\\n" "$@" | grep -v "{headers}")\n')
        bare.chmod(0o755)
        environment["CC"] = str(bare)
        reason = "bare-gcc' failed; Python.h may be missing"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    *chunked, refusal = result.stdout.splitlines()
    assert chunked == ["{'causal': True, 'starts_BT': None}"] * 2
    assert result.stderr.count("cannot compile its kernels here") == 1 and reason in result.stderr
    assert "install a C compiler and Python's headers" in result.stderr and "'chunked' instead" in result.stderr
    assert refusal.startswith(
        "backend 'triton' cannot be used: Triton is installed and cannot compile its kernels here"
    )


def test_the_package_exports_the_loss() -> None:
    assert set(kernels.__all__) == {"Backend", "relation_kl", "relation_kl_sum", "stored_relation_kl_sum"}
