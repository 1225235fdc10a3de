"""The relation loss tile by tile in tensor operations, for any device, with a backward pass of its own.

A tile holds some rows i of some matrices with all their columns j, so it finishes its rows' log-sum-exps. Two passes,
four exponentials per pair (two forward, two backward), and beside the inputs memory for the log-sum-exps and for three
tiles of bounded size: O(T). Every tile is visited in order by one thread of control, so results repeat exactly.

Written for the caches and vector units of a CPU: exponentials are powers of two, three times as fast there, so logits
carry a factor log2(e); tiles live in buffers that are allocated once; matrices are cut to their real positions where
the lengths are on the host; where reading them would make the host wait for a device, columns are masked and padding is
replaced by zeros, so that no number in it, however large, reaches a logit.

With a causal mask the tiles of a matrix are bands of rows, each with the columns up to its last row: a little more than
half of the pairs, of which only those beside the diagonal are masked. Segments of a row are matrices of their own where
lengths are on the host, and are masked elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.kernels.reference import MASKED_LOGIT, real_BT, widen

TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits in one tile: three such tiles stay in a CPU's cache, or fill a GPU without claiming its memory."""

_NEVER = -MASKED_LOGIT
"""Log-sum-exp of a padding row: every exponential of the row is 0 in the backward pass."""

_BANDS, _BAND_ROWS = 8, 32
"""Of a causal matrix: so many bands, which visit 9/16 of its pairs, but of so many rows at least: products of fewer are
slow."""

_TILES_TOGETHER = 2
"""Of the longest band: the matrices of so many tiles go through all bands before the next ones, so that their vectors,
which every band reads again, stay in a cache."""


def chunked_kl_sum(
    teacher_BATd: Tensor,
    student_BATd: Tensor,
    length_B: Tensor | None = None,
    *,
    causal: bool = False,
    starts_BT: Tensor | None = None,
    tile_elements: int | None = None,
) -> Tensor:
    """Sum of KL_i over heads and real positions; a tile has at most `tile_elements` logits, or is a single row."""
    if tile_elements is None:
        tile_elements = TILE_ELEMENTS.get(student_BATd.device.type, TILE_ELEMENTS["cuda"])
    total: Tensor = _ChunkedKL.apply(  # type: ignore[no-untyped-call]
        teacher_BATd.detach(), student_BATd, length_B, causal, starts_BT, tile_elements
    )
    return total


class _Tile(NamedTuple):
    """Rows of some matrices, and the columns that these rows are related to."""

    matrices: slice
    rows: slice
    columns: slice

    def cut(self, buffer: Tensor) -> Tensor:
        """The first elements of a flat buffer in the shape of the tile."""
        shape = [part.stop - part.start for part in self]
        return buffer[: math.prod(shape)].view(shape)


class _Mask(NamedTuple):
    """What is left out of the tiles.

    Columns of padding, pairs of different segments, and with a causal mask what is above the diagonal, which lies in
    the last columns of a tile, those of its own rows.
    """

    padding_N1T: Tensor | None
    segment_NT1: Tensor | None
    above_RR: Tensor | None

    def apply(self, tile: _Tile, out: Tensor) -> Tensor:
        """Mask the logits of a tile."""
        if self.padding_N1T is not None:
            out.add_(self.padding_N1T[tile.matrices, :, tile.columns])
        if self.segment_NT1 is not None:
            rows, columns = (self.segment_NT1[tile.matrices, part] for part in (tile.rows, tile.columns))
            out.masked_fill_(rows != columns.mT, MASKED_LOGIT)
        if self.above_RR is not None:
            rows_here = tile.rows.stop - tile.rows.start
            out[..., -rows_here:].add_(self.above_RR[:rows_here, :rows_here])
        return out


class _ChunkedKL(torch.autograd.Function):
    """Sum of KL_i over N = B * A matrices.

    In powers of two, a' = a log2(e), with M_i the largest logit of a row and L_i = log2 sum_j 2^(a'_ij - M_i),

        KL_i / log(2) = sum_j P_ij ((a'_ij - M^a_i) - (b'_ij - M^b_i)) - L^a_i + L^b_i

    The gradient is the sum over both places where s_i enters the symmetric logits b_ij, g being that of the loss:

        dL/ds_i = g/sqrt(d_S) sum_j (W_ij + W_ji) s_j,   W_ij = S_ij - P_ij

    The tile of rows i adds W s to its own rows and W^T s to all rows, so each W_ij is computed once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher_BATd: Tensor,
        student_BATd: Tensor,
        length_B: Tensor | None,
        causal: bool,
        starts_BT: Tensor | None,
        tile_elements: int,
    ) -> Tensor:
        shape = student_BATd.shape
        teacher_NTd, student_NTd = (widen(vectors).flatten(0, 1) for vectors in (teacher_BATd, student_BATd))
        if causal:
            # every band reads its columns again, which should lie together
            teacher_NTd, student_NTd = teacher_NTd.contiguous(), student_NTd.contiguous()
        if length_B is None and starts_BT is not None:
            length_B = torch.full_like(starts_BT[:, 0], shape[2], dtype=torch.long)
        padding_NT1 = mask_N1T = segment_NT1 = None
        pieces: list[tuple[tuple[int, int], ...]] = [((0, shape[2]),)] * shape[0]
        if length_B is not None and _cuts(length_B, shape, tile_elements):
            pieces = _pieces(length_B.clamp(0, shape[2]), starts_BT)
        elif length_B is not None:
            padding_NT1 = ~real_BT(length_B, shape[2]).repeat_interleave(shape[1], dim=0).unsqueeze(-1)
            mask_N1T = torch.zeros_like(padding_NT1, dtype=student_NTd.dtype).masked_fill_(padding_NT1, MASKED_LOGIT).mT
            teacher_NTd, student_NTd = (v.masked_fill(padding_NT1, 0) for v in (teacher_NTd, student_NTd))
            if starts_BT is not None:
                segment_NT1 = starts_BT.cumsum(1).repeat_interleave(shape[1], dim=0).unsqueeze(-1)
        tiles = list(_tiles(shape, pieces, tile_elements, causal=causal))
        mask = _Mask(mask_N1T, segment_NT1, _above_diagonal(tiles, student_NTd) if causal else None)
        lse_p_NT1, lse_s_NT1, kl_NT1 = (student_NTd.new_zeros((*student_NTd.shape[:2], 1)) for _ in range(3))
        nothing = student_NTd.new_zeros(())
        for tile, (a, b, ratio) in _cut(tiles, student_NTd, 3):
            rows = tile.matrices, tile.rows
            top_p = _logits(teacher_NTd, tile, nothing, mask, out=a).amax(-1, keepdim=True)
            top_s = _logits(student_NTd, tile, nothing, mask, out=b).amax(-1, keepdim=True)
            torch.sub(a.sub_(top_p), b.sub_(top_s), out=ratio)
            mass_p, mass_s = a.exp2_().sum(-1, keepdim=True), b.exp2_().sum(-1, keepdim=True)
            log_p, log_s = mass_p.log2(), mass_s.log2()
            kl_NT1[rows] = torch.linalg.vecdot(a, ratio).unsqueeze(-1).div_(mass_p).sub_(log_p).add_(log_s)
            lse_p_NT1[rows], lse_s_NT1[rows] = log_p.add_(top_p), log_s.add_(top_s)
        if padding_NT1 is not None:
            kl_NT1.masked_fill_(padding_NT1, 0)
            lse_p_NT1.masked_fill_(padding_NT1, _NEVER)
            lse_s_NT1.masked_fill_(padding_NT1, _NEVER)
        ctx.save_for_backward(teacher_NTd, student_NTd, *mask, lse_p_NT1, lse_s_NT1)
        ctx.tiles, ctx.shape, ctx.dtype, ctx.causal = tiles, shape, student_BATd.dtype, causal
        return kl_NT1.sum() * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        teacher_NTd, student_NTd, *masked, lse_p_NT1, lse_s_NT1 = ctx.saved_tensors
        mask = _Mask(*masked)
        grad_NTd = torch.zeros_like(student_NTd)
        # the sum of W^T s is kept transposed: s^T W is a faster product than W^T s
        grad_NdT = torch.zeros_like(student_NTd.transpose(1, 2).contiguous())
        for tile, (p, w) in _cut(ctx.tiles, student_NTd, 2):
            rows = tile.matrices, tile.rows
            _logits(teacher_NTd, tile, -lse_p_NT1[rows], mask, out=p).exp2_()
            _logits(student_NTd, tile, -lse_s_NT1[rows], mask, out=w).exp2_().sub_(p)
            columns = tile.matrices, slice(None), tile.columns
            if ctx.causal:
                # into parts of several matrices, products would be added one matrix at a time
                grad_NdT[tile.matrices, :, tile.rows].add_(
                    torch.bmm(student_NTd[tile.matrices, tile.columns].transpose(1, 2), w.transpose(1, 2))
                )
                grad_NdT[columns].add_(torch.bmm(student_NTd[rows].transpose(1, 2), w))
            else:
                grad_NTd[rows].baddbmm_(w, student_NTd[tile.matrices, tile.columns])
                grad_NdT[columns].baddbmm_(student_NTd[rows].transpose(1, 2), w)
        grad_NTd.add_(grad_NdT.transpose(1, 2)).mul_(grad / math.sqrt(ctx.shape[-1]))
        return None, grad_NTd.view(ctx.shape).to(ctx.dtype), None, None, None, None


def _logits(vectors_NTd: Tensor, tile: _Tile, bias: Tensor, mask: _Mask, *, out: Tensor) -> Tensor:
    """`bias` plus the scaled dot products of the tile's rows and columns in powers of two, masked."""
    rows, columns = vectors_NTd[tile.matrices, tile.rows], vectors_NTd[tile.matrices, tile.columns].transpose(1, 2)
    scale = 1 / (math.log(2) * math.sqrt(vectors_NTd.shape[-1]))
    torch.baddbmm(bias, rows, columns, alpha=scale, out=out)
    return mask.apply(tile, out)


def _cut(tiles: list[_Tile], like: Tensor, count: int) -> Iterator[tuple[_Tile, list[Tensor]]]:
    """Every tile with `count` buffers of its shape, which are the same memory each time."""
    largest = max((math.prod(part.stop - part.start for part in tile) for tile in tiles), default=0)
    buffers = [like.new_empty(largest) for _ in range(count)]
    for tile in tiles:
        yield tile, [tile.cut(buffer) for buffer in buffers]


def _pieces(length_B: Tensor, starts_BT: Tensor | None) -> list[tuple[tuple[int, int], ...]]:
    """From where to where each segment of each row reaches, without padding; a row is one if no starts are given."""
    lengths = length_B.tolist()
    if starts_BT is None:
        return [((0, length),) for length in lengths]
    rows = []
    for length, starts_T in zip(lengths, starts_BT, strict=True):
        edges = [0, *(start for start in starts_T[:length].nonzero()[:, 0].tolist() if start), length]
        rows.append(tuple(pairwise(edges)))
    return rows


def _tiles(
    shape: torch.Size, pieces: list[tuple[tuple[int, int], ...]], tile_elements: int, *, causal: bool = False
) -> Iterator[_Tile]:
    """Tiles that cover every piece of every matrix, neighbouring rows of equal pieces together."""
    first = 0
    for row_pieces, group in groupby(pieces):
        last = first + shape[1] * len(list(group))
        for start, stop in row_pieces:
            cut = _bands if causal else _squares
            yield from cut(slice(first, last), slice(start, stop), tile_elements)
        first = last


def _squares(matrices: slice, piece: slice, tile_elements: int) -> Iterator[_Tile]:
    """Tiles of all columns, of as many rows as there is room for."""
    length = piece.stop - piece.start
    rows = max(1, min(length, tile_elements // max(1, length)))
    for several in _runs(matrices, tile_elements // max(1, rows * length)):
        for some in _runs(piece, rows):
            yield _Tile(matrices=several, rows=some, columns=piece)


def _bands(matrices: slice, piece: slice, tile_elements: int) -> Iterator[_Tile]:
    """Tiles of few rows and the columns up to the last of them."""
    length = piece.stop - piece.start
    rows = max(1, min(length, max(_BAND_ROWS, length // _BANDS), tile_elements // max(1, length)))
    for together in _runs(matrices, _TILES_TOGETHER * tile_elements // max(1, rows * length)):
        for some in _runs(piece, rows):
            columns = slice(piece.start, some.stop)
            pairs = (some.stop - some.start) * (columns.stop - columns.start)
            for several in _runs(together, tile_elements // pairs):
                yield _Tile(matrices=several, rows=some, columns=columns)


def _runs(whole: slice, size: int) -> Iterator[slice]:
    """A slice cut into slices of `size`, 1 at least."""
    size = max(1, size)
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))


def _above_diagonal(tiles: list[_Tile], like: Tensor) -> Tensor:
    """`MASKED_LOGIT` above the diagonal and 0 elsewhere, for as many rows as a tile has at most."""
    rows = max((tile.rows.stop - tile.rows.start for tile in tiles), default=0)
    return like.new_full((rows, rows), MASKED_LOGIT).triu_(1)


def _cuts(length_B: Tensor, shape: torch.Size, tile_elements: int) -> bool:
    """Whether matrices are cut to their lengths: where the host has these, and one row's heads fill a tile somewhat."""
    return length_B.device.type == "cpu" and 8 * math.prod(shape[1:3]) * shape[2] > tile_elements
