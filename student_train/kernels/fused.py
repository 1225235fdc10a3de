"""The relation loss in two Triton kernels: O(T) memory, three or four exponentials per pair, the host never waits.

In: vectors on a GPU in any layout whose components are adjacent, such as heads that are a view of [B, T, A d]. Out: the
sum of the divergences, and through autograd the gradient in the student's vectors, in their layout. Products are IEEE
float32 for a float32 student. For a half-precision one they run on tensor cores in its type, to which the teacher's
vectors are rounded as they are read, and add up in float32. Beside the gradient this takes 16 bytes per head and
position, the log-sum-exps twice over; once they are kept from the forward to the backward pass. Where matrices are many
the backward pass takes another 4 bytes per component of the student: half the work for a second, float32 gradient.

Tile sizes follow from the head widths and the type, never from a timing, and the way of the backward pass from the
number of matrices, so results repeat exactly from run to run on one kind of GPU. The kernels (triton_relation.py,
triton_gradient.py) are compiled at the first call for a set of widths, types, masks and alignments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.kernels.triton_gradient import relation_backward
from student_train.kernels.triton_relation import relation_forward

SYMMETRIC_FROM = 512
"""Matrices from which the backward pass takes one program for each: so many keep the largest GPUs busy, about four for
each of their processors, and pairs are then computed once, not twice."""

_GENTLE_LSE = 100
"""Log-sum-exp, in powers of two, below which a matrix's exponentials stay within float32 by themselves: 2^L must not
overflow, nor S_ij lose bits below the smallest number where S_ji counts."""

_READ_AT_ONCE = 16
"""Bytes that a thread of a GPU reads at once at most."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel cuts its matrices: rows of a program, columns at a time; its warps, and its stages of loading.

    `registers` is the most that a thread may have, so that more programs fit; 0 leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    registers: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How both passes of one call are computed: `symmetric` takes each pair of positions once in the backward pass.

    It needs rows that are whole runs of columns.
    """

    forward: Tiling
    backward: Tiling
    symmetric: bool


def fused_kl_sum(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Sum of KL_i over heads and real positions; how is chosen by shape and type unless a plan is given."""
    batch, heads, positions, width = student_BATd.shape
    if length_B is None:
        length_B = torch.full((batch,), positions, device=student_BATd.device)
    length_B = length_B.contiguous()
    if plan is None:
        plan = choose_plan(batch * heads, teacher_BATd.shape[-1], width, student_BATd.dtype)
    ranges_2BT = None if starts_BT is None else segment_ranges(starts_BT, length_B)
    total: Tensor = _FusedKL.apply(  # type: ignore[no-untyped-call]
        teacher_BATd.detach(), student_BATd, length_B, ranges_2BT, causal, plan
    )
    return total


def segment_ranges(starts_BT: Tensor, length_B: Tensor) -> Tensor:
    """[2, B, T]: where the segment of each position begins, and where it ends, in int32; without waiting for a device.

    The end of one is the start of the next, or the row's length.
    """
    positions = starts_BT.shape[1]
    position_T = torch.arange(positions, device=starts_BT.device)
    begin_BT = torch.where(starts_BT, position_T, 0).cummax(1).values
    # the next start behind each position: the least of the starts from there on
    start_BT = torch.where(starts_BT, position_T, positions)
    later_BT = start_BT.flip(1).cummin(1).values.flip(1)
    next_BT = torch.cat([later_BT[:, 1:], torch.full_like(later_BT[:, :1], positions)], dim=1)
    return torch.stack([begin_BT, next_BT.minimum(length_B[:, None])]).to(torch.int32)


def choose_plan(matrices: int, teacher_width: int, student_width: int, dtype: torch.dtype) -> Plan:
    """Tiles whose loops keep all values in registers, and of these the ones with the fewest instructions per pair.

    Seen in the machine code for compute capabilities 8.0 and 9.0. Products in float32 go through the vector units,
    which hold both factors in registers.
    """
    widest, symmetric = max(teacher_width, student_width), matrices >= SYMMETRIC_FROM
    if dtype == torch.float32:
        rows = 64 if widest <= 32 else 32
        forward = Tiling(rows=64 if widest <= 64 else 32, columns=32)
        return Plan(forward=forward, backward=Tiling(rows=rows, columns=32), symmetric=symmetric)
    # three programs of four warps share the registers of a processor
    forward = Tiling(rows=64, columns=64, registers=168) if widest <= 64 else Tiling(rows=64, columns=32)
    backward = Tiling(rows=64, columns=32)
    if symmetric:
        # 64 rows are the fewest of a tensor core's product, and the columns are the rows of W^T
        backward = Tiling(rows=64, columns=64, warps=4 if widest <= 64 else 8)
    return Plan(forward=forward, backward=backward, symmetric=symmetric)


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher_BATd: Tensor,
        student_BATd: Tensor,
        length_B: Tensor,
        ranges_2BT: Tensor | None,
        causal: bool,
        plan: Plan,
    ) -> Tensor:
        teacher_BATd, student_BATd = _adjacent(teacher_BATd), _adjacent(student_BATd)
        batch, heads, positions, _ = student_BATd.shape
        lse_2NT = student_BATd.new_empty((2, batch * heads, positions), dtype=torch.float32)
        grid = (batch * heads * math.ceil(positions / plan.forward.rows),)
        kl_parts = lse_2NT.new_empty(grid)
        aligned = _aligned(teacher_BATd), _aligned(student_BATd)
        with torch.cuda.device_of(student_BATd):
            relation_forward[grid](
                teacher_BATd,
                student_BATd,
                length_B,
                *_pointers(ranges_2BT, length_B),
                kl_parts,
                *lse_2NT,
                heads,
                positions,
                *_strides(teacher_BATd, aligned[0]),
                *_strides(student_BATd, aligned[1]),
                _scale(teacher_BATd),
                _scale(student_BATd),
                **_constants(teacher_BATd, student_BATd, aligned, plan.forward),
                CAUSAL=causal,
                RANGES=ranges_2BT is not None,
            )
        ctx.save_for_backward(teacher_BATd, student_BATd, length_B, ranges_2BT, lse_2NT)
        ctx.plan, ctx.causal = plan, causal
        return kl_parts.sum() * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        teacher_BATd, student_BATd, length_B, ranges_2BT, lse_2NT = ctx.saved_tensors
        batch, heads, positions, width = student_BATd.shape
        plan: Plan = ctx.plan
        gradient_BATd = torch.empty_like(student_BATd)
        programs, sums = batch * heads, gradient_BATd
        if plan.symmetric:
            sums = lse_2NT.new_zeros((batch * heads, positions, width))
        else:
            programs *= math.ceil(positions / plan.backward.rows)
        aligned = _aligned(teacher_BATd), _aligned(student_BATd, gradient_BATd)
        with torch.cuda.device_of(student_BATd):
            relation_backward[(programs,)](
                teacher_BATd,
                student_BATd,
                length_B,
                *_pointers(ranges_2BT, length_B),
                *_of_positions(lse_2NT, causal=ctx.causal),
                grad,
                sums,
                gradient_BATd,
                heads,
                positions,
                *_strides(teacher_BATd, aligned[0]),
                *_strides(student_BATd, aligned[1]),
                *_strides(gradient_BATd, aligned[1]),
                _scale(teacher_BATd),
                _scale(student_BATd),
                1 / math.sqrt(width),
                **_constants(teacher_BATd, student_BATd, aligned, plan.backward),
                SYMMETRIC=plan.symmetric,
                CAUSAL=ctx.causal,
                RANGES=ranges_2BT is not None,
            )
        return None, gradient_BATd, None, None, None, None


def _of_positions(lse_2NT: Tensor, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass reads of each position, for both models, and which matrices are gentle.

    2^-L in gentle matrices, L in the others. Under a causal mask it is L everywhere, and the last is not read.
    """
    if causal:
        return lse_2NT[0], lse_2NT[1], lse_2NT
    gentle_N = lse_2NT.amax((0, 2)) < _GENTLE_LSE
    of_2NT = torch.where(gentle_N[:, None], torch.exp2(-lse_2NT), lse_2NT)
    return of_2NT[0], of_2NT[1], gentle_N


def _pointers(ranges_2BT: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Where segments begin and end, or something else that is not read."""
    return (unread, unread) if ranges_2BT is None else (ranges_2BT[0], ranges_2BT[1])


def _adjacent(vectors_BATd: Tensor) -> Tensor:
    return vectors_BATd if vectors_BATd.stride(-1) == 1 else vectors_BATd.contiguous()


def _aligned(*vectors_BATd: Tensor) -> int:
    """How many components may be read at once wherever a vector begins."""
    return read_at_once(vectors_BATd[0].dtype, *(stride for vectors in vectors_BATd for stride in vectors.stride()[:3]))


def read_at_once(dtype: torch.dtype, *strides: int) -> int:
    """The most components that a thread reads at once, of those that divide all strides."""
    return math.gcd(_READ_AT_ONCE // dtype.itemsize, *strides)


def _strides(vectors_BATd: Tensor, aligned: int) -> tuple[int, ...]:
    """In runs of `aligned` components."""
    return tuple(stride // aligned for stride in vectors_BATd.stride()[:3])


def _scale(vectors_BATd: Tensor) -> float:
    """From dot products to logits in powers of two."""
    return 1 / (math.log(2) * math.sqrt(vectors_BATd.shape[-1]))


def _constants(teacher_BATd: Tensor, student_BATd: Tensor, aligned: tuple[int, int], tiling: Tiling) -> dict[str, int]:
    constants = {
        "TEACHER_WIDTH": teacher_BATd.shape[-1],
        "STUDENT_WIDTH": student_BATd.shape[-1],
        "TEACHER_TILE": tile_width(teacher_BATd.shape[-1]),
        "STUDENT_TILE": tile_width(student_BATd.shape[-1]),
        "TEACHER_ALIGNED": aligned[0],
        "STUDENT_ALIGNED": aligned[1],
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    return constants | ({"maxnreg": tiling.registers} if tiling.registers else {})


def tile_width(width: int) -> int:
    """The next power of two, which a tile's side must be, and at least the narrowest product of a tensor core."""
    narrowest = 16
    return max(narrowest, int(triton.next_power_of_2(width)))
