"""The relation loss of MiniLMv2: KL divergence between self-attention relations of teacher and student vectors.

In: vectors of one relation (queries, keys or values), split into A relation heads, of teacher and student; the two head
widths may differ. For every row, head and position i the divergence of two softmax distributions over positions j is

    KL_i = sum_j P_ij (log P_ij - log S_ij),   P = softmax(x_i . x_j / sqrt(d_T)),   S = softmax(s_i . s_j / sqrt(d_S))

(Wang et al., "MiniLMv2", Findings of ACL 2021, equations 2-4). Out: its sum or mean. Padding is left out as row and as
column; it may hold anything finite. Which j a position i is related to may be narrowed: `causal`, to j <= i, which is
what a decoder sees; with the starts of a row's segments, to those of its own. Gradients reach the student's vectors
only.

Three backends give the same numbers, each repeats its own exactly, and none makes the host wait for a GPU:

- `reference` writes the formula down and keeps several [T, T] matrices per head for autograd (reference.py);
- `chunked` goes through tiles in tensor operations, on any device, in O(T) memory (chunked.py);
- `triton` is two kernels for GPUs, in O(T) memory (fused.py): head widths up to 128, float32 and half precision. Where
  Triton is installed and cannot compile, `auto` takes `chunked` and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from student_train.kernels.chunked import chunked_kl_sum
from student_train.kernels.reference import reference_kl_sum, stored_kl_sum

Backend = Literal["auto", "reference", "chunked", "triton"]

CANNOT_COMPILE = "Triton is installed and cannot compile its kernels here"
"""An obstacle of the machine, not of what is computed: whoever left the choice to `auto` should hear of it."""

WIDEST_HEAD = 128
"""Of the Triton kernels: wider tiles would not fit into a GPU's registers."""


def relation_kl(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean of KL_i over heads and real positions: a scalar, differentiable in the student's vectors.

    Args:
        teacher_BATd: B rows, A heads, T positions, d_T components.
        student_BATd: the same with d_S components.
        length_B: real positions of each row, the first ones, on the same device; None if all are real.
        causal: relate each position to itself and those before it, not to those behind it.
        starts_BT: True where a segment of a row begins, on the same device: positions are related within their segment;
            None where a row is one.
        backend: by name, or `auto`: `triton` where its kernels run, else `chunked`. Where Triton is installed and
            cannot compile, that is said once, as a warning of this module's logger.
    """
    batch, _, positions, _ = student_BATd.shape
    real = batch * positions if length_B is None else length_B.sum().clamp(min=1)
    total = relation_kl_sum(teacher_BATd, student_BATd, length_B, causal=causal, starts_BT=starts_BT, backend=backend)
    return total / real


def relation_kl_sum(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over real positions of the mean of KL_i over heads; arguments as in `relation_kl`.

    Arithmetic, and the result, is float32 for half precision and float64 for float64.

    Raises:
        ValueError: rows, heads or positions of the two differ, or `triton` was asked for where it does not run.
    """
    if teacher_BATd.shape[:3] != student_BATd.shape[:3]:
        raise ValueError(
            f"teacher vectors {tuple(teacher_BATd.shape)} and student vectors {tuple(student_BATd.shape)} must agree "
            "in rows, heads and positions: split both into the same number of relation heads"
        )
    if backend == "auto":
        obstacle = _obstacle(teacher_BATd, student_BATd)
        if obstacle is not None and obstacle.startswith(CANNOT_COMPILE):
            _say_once(f"{obstacle}; relation losses take backend 'chunked' instead, which needs several times as long")
        backend = "chunked" if obstacle else "triton"
    kl_sum = _kernel(backend, teacher_BATd, student_BATd)
    total: Tensor = kl_sum(teacher_BATd, student_BATd, length_B, causal=causal, starts_BT=starts_BT)
    return total / student_BATd.shape[1]


def stored_relation_kl_sum(
    teacher_BATT: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """`relation_kl_sum` for relations that the teacher's side holds as matrices, [B, A, T, T], 0 at padding.

    The student's are materialised too.
    """
    total = stored_kl_sum(teacher_BATT, student_BATd, length_B, causal=causal, starts_BT=starts_BT)
    return total / student_BATd.shape[1]


def _kernel(backend: Backend, teacher_BATd: Tensor, student_BATd: Tensor) -> Callable[..., Tensor]:
    """What a backend sums with.

    Raises:
        ValueError: it does not run on these vectors.
    """
    if backend == "reference":
        return reference_kl_sum
    if backend == "chunked":
        return chunked_kl_sum
    # Triton's interpreter, which is for tests, runs the kernels on a CPU
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _obstacle(teacher_BATd, student_BATd, interpreted=interpreted)
    if obstacle is not None:
        raise ValueError(f"backend 'triton' cannot be used: {obstacle}; 'auto' takes the fastest one that can")
    from student_train.kernels.fused import fused_kl_sum  # Triton need not be there

    return fused_kl_sum


def _obstacle(teacher_BATd: Tensor, student_BATd: Tensor, *, interpreted: bool = False) -> str | None:
    """Why the Triton kernels cannot take these vectors; None if they can."""
    if not (student_BATd.is_cuda or interpreted):
        return f"the vectors are on {student_BATd.device.type!r}, and its kernels run on GPUs"
    if student_BATd.is_cuda and torch.cuda.get_device_capability(student_BATd.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or more"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'kdcache[triton]')"
    if torch.float64 in (teacher_BATd.dtype, student_BATd.dtype):
        return "its kernels compute in float32, and these vectors are float64"
    widest = max(teacher_BATd.shape[-1], student_BATd.shape[-1])
    if widest > WIDEST_HEAD:
        return f"heads of {widest} components are wider than {WIDEST_HEAD}"
    if not interpreted and (failure := _why_triton_cannot_compile(student_BATd)) is not None:
        return f"{CANNOT_COMPILE} ({failure}): install a C compiler and Python's headers (gcc, python3-dev)"
    return None


def _why_triton_cannot_compile(vectors: Tensor) -> str | None:
    from student_train.kernels.triton_probe import why_triton_cannot_compile  # Triton need not be there

    return why_triton_cannot_compile(vectors)


@cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)
