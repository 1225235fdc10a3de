"""The relation loss in two Triton kernels: O(T) memory, four exponentials per pair, nothing between GPU and host.

In: vectors on a GPU in any layout whose components are adjacent, such as heads that are a view of [B, T, A d]. Out: the
sum of the divergences, and through autograd the gradient in the student's vectors, in their layout. Products are IEEE
float32 for a float32 student. For a half-precision one they run on tensor cores in its type, to which the teacher's
vectors are rounded as they are read, and add up in float32. Beside the gradient this takes 16 bytes per head and
position, the log-sum-exps and their inverses; the former are kept from the forward to the backward pass.

Tile sizes follow from the head widths and the type, never from a timing, so results repeat exactly from run to run on
one kind of GPU. The kernels (triton_relation.py) are compiled at the first call for a set of widths and types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.kernels.triton_relation import relation_backward, relation_forward


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel cuts its matrices: rows of a program, columns at a time; its warps, and its stages of loading."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


def fused_kl_sum(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Sum of KL_i over heads and real positions."""
    batch, _, positions, width = student_BATd.shape
    if length_B is None:
        length_B = torch.full((batch,), positions, device=student_BATd.device)
    length_B = length_B.contiguous()
    if tiling is None:
        tiling = choose_tiling(max(width, teacher_BATd.shape[-1]), student_BATd.dtype)
    ranges_2BT = None if starts_BT is None else segment_ranges(starts_BT, length_B)
    total: Tensor = _FusedKL.apply(  # type: ignore[no-untyped-call]
        teacher_BATd.detach(), student_BATd, length_B, ranges_2BT, causal, tiling
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


def choose_tiling(width: int, dtype: torch.dtype) -> Tiling:
    """The largest tiles whose programs keep everything, or all but a few values, in registers.

    Seen in the machine code for compute capabilities 8.0 and 9.0. Products in float32 go through the vector units,
    which hold both factors in registers.
    """
    if dtype != torch.float32:
        return Tiling(rows=64, columns=64 if width <= 32 else 32)
    return Tiling(rows=64 if width <= 32 else 32, columns=32)


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher_BATd: Tensor,
        student_BATd: Tensor,
        length_B: Tensor,
        ranges_2BT: Tensor | None,
        causal: bool,
        tiling: Tiling,
    ) -> Tensor:
        teacher_BATd, student_BATd = _adjacent(teacher_BATd), _adjacent(student_BATd)
        batch, heads, positions, _ = student_BATd.shape
        lse_2NT = student_BATd.new_empty((2, batch * heads, positions), dtype=torch.float32)
        grid = _grid(student_BATd, tiling)
        kl_parts = lse_2NT.new_empty(grid)
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
                *teacher_BATd.stride()[:3],
                *student_BATd.stride()[:3],
                _scale(teacher_BATd),
                _scale(student_BATd),
                **_constants(teacher_BATd, student_BATd, tiling),
                CAUSAL=causal,
                RANGES=ranges_2BT is not None,
            )
        ctx.save_for_backward(teacher_BATd, student_BATd, length_B, ranges_2BT, lse_2NT)
        ctx.tiling, ctx.causal = tiling, causal
        return kl_parts.sum() * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        teacher_BATd, student_BATd, length_B, ranges_2BT, lse_2NT = ctx.saved_tensors
        _, heads, positions, width = student_BATd.shape
        gradient_BATd = torch.empty_like(student_BATd)
        with torch.cuda.device_of(student_BATd):
            relation_backward[_grid(student_BATd, ctx.tiling)](
                teacher_BATd,
                student_BATd,
                length_B,
                *_pointers(ranges_2BT, length_B),
                *lse_2NT,
                *torch.exp2(-lse_2NT),
                lse_2NT.amax((0, 2)),
                grad,
                gradient_BATd,
                heads,
                positions,
                *teacher_BATd.stride()[:3],
                *student_BATd.stride()[:3],
                *gradient_BATd.stride()[:3],
                _scale(teacher_BATd),
                _scale(student_BATd),
                1 / math.sqrt(width),
                **_constants(teacher_BATd, student_BATd, ctx.tiling),
                CAUSAL=ctx.causal,
                RANGES=ranges_2BT is not None,
            )
        return None, gradient_BATd, None, None, None, None


def _pointers(ranges_2BT: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Where segments begin and end, or something else that is not read."""
    return (unread, unread) if ranges_2BT is None else (ranges_2BT[0], ranges_2BT[1])


def _adjacent(vectors_BATd: Tensor) -> Tensor:
    return vectors_BATd if vectors_BATd.stride(-1) == 1 else vectors_BATd.contiguous()


def _grid(student_BATd: Tensor, tiling: Tiling) -> tuple[int]:
    batch, heads, positions, _ = student_BATd.shape
    return (batch * heads * math.ceil(positions / tiling.rows),)


def _scale(vectors_BATd: Tensor) -> float:
    """From dot products to logits in powers of two."""
    return 1 / (math.log(2) * math.sqrt(vectors_BATd.shape[-1]))


def _constants(teacher_BATd: Tensor, student_BATd: Tensor, tiling: Tiling) -> dict[str, int]:
    return {
        "TEACHER_WIDTH": teacher_BATd.shape[-1],
        "STUDENT_WIDTH": student_BATd.shape[-1],
        "TEACHER_TILE": tile_width(teacher_BATd.shape[-1]),
        "STUDENT_TILE": tile_width(student_BATd.shape[-1]),
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def tile_width(width: int) -> int:
    """The next power of two, which a tile's side must be, and at least the narrowest product of a tensor core."""
    narrowest = 16
    return max(narrowest, int(triton.next_power_of_2(width)))
