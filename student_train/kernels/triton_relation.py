"""What both passes of the relation loss in Triton share, and the forward pass.

A program computes a run of rows i of one matrix, over all columns j that these see. Logits of both models are kept in
powers of two, a' = a log2(e) (the scales hold that factor), so that an exponential is one instruction, and so are the
log-sum-exps L^a and L^b that the forward pass leaves for the backward pass (triton_gradient.py). With s_i the student's
vectors,

    KL_i / log(2) = sum_j P_ij (a'_ij - b'_ij) - L^a_i + L^b_i,   P_ij = 2^(a'_ij - L^a_i)

The usual way subtracts the largest logit of a row, which costs a search in every tile. Here sums are first taken of
2^a' as it is. That is no less exact: the logit of a position with itself is a square, so a sum is at least 1, and what
falls below float32's smallest number beside it is nothing. Only overflow could spoil it, above logits of 127, and it
cannot hide: what adds up numbers of one sign is infinite from then on, and so is (or is no number) what multiplies it.
A program that finds one of its sums so goes through its columns again with the largest logits subtracted.

Each row sees a range of columns: all real ones, those of its segment (`RANGES`), up to itself under a causal mask.
Tiles that no row of a program sees are skipped; only those that some row sees in part are masked.

Head widths are padded with zeros to the width of a tile. Positions beyond the length are read as zeros. Strides are
given in runs of `ALIGNED` components, from which the compiler knows how many components may be read at once.

These functions are in Triton's language, a part of Python's; fused.py launches them.
"""

import triton
import triton.language as tl


@triton.jit
def relation_forward(
    teacher,
    student,
    lengths,
    begins,
    ends,
    kl_parts,
    lse_teacher,
    lse_student,
    heads,
    positions,
    teacher_stride_B,
    teacher_stride_A,
    teacher_stride_T,
    student_stride_B,
    student_stride_A,
    student_stride_T,
    teacher_scale,
    student_scale,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_TILE: tl.constexpr,
    STUDENT_TILE: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """Sum of KL_i / log(2) over each program's rows, and both log-sum-exps of each row."""
    matrix = (tl.program_id(0) // tl.cdiv(positions, ROWS)).to(tl.int64)
    batch = matrix // heads
    head = matrix % heads
    length = tl.minimum(tl.load(lengths + batch), positions).to(tl.int32)
    teacher += (batch * teacher_stride_B + head * teacher_stride_A) * TEACHER_ALIGNED
    student += (batch * student_stride_B + head * student_stride_A) * STUDENT_ALIGNED
    first_row = tl.program_id(0) % tl.cdiv(positions, ROWS) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    real = rows < length
    begin_i, end_i = seen_columns(begins, ends, batch * positions, rows, length, CAUSAL, RANGES)
    first, last, clear_from, clear_to = visited_columns(begin_i, end_i, real, length, COLUMNS, CAUSAL, RANGES)
    x_i = read_vectors(teacher, rows, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE, TEACHER_ALIGNED).to(
        student.dtype.element_ty
    )
    s_i = read_vectors(student, rows, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE, STUDENT_ALIGNED)
    mass_a, mass_b, ratio, top_a, top_b = _sums(
        teacher, student, x_i, s_i, begin_i, end_i, first, last, clear_from, clear_to, length,
        teacher_stride_T, student_stride_T, teacher_scale, student_scale,
        TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, TEACHER_ALIGNED, STUDENT_ALIGNED,
        ROWS, COLUMNS, CAUSAL or RANGES, RANGES, False,
    )  # fmt: skip
    finite = (mass_a < float("inf")) & (mass_b < float("inf")) & (tl.abs(ratio) < float("inf"))
    if tl.min(finite.to(tl.int32)) == 0:
        mass_a, mass_b, ratio, top_a, top_b = _sums(
            teacher, student, x_i, s_i, begin_i, end_i, first, last, clear_from, clear_to, length,
            teacher_stride_T, student_stride_T, teacher_scale, student_scale,
            TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, TEACHER_ALIGNED, STUDENT_ALIGNED,
            ROWS, COLUMNS, CAUSAL or RANGES, RANGES, True,
        )  # fmt: skip
    mass_a = tl.where(real, mass_a, 1.0)
    log_a = tl.where(real, top_a + tl.log2(mass_a), 0.0)
    log_b = tl.where(real, top_b + tl.log2(tl.where(real, mass_b, 1.0)), 0.0)
    tl.store(kl_parts + tl.program_id(0), tl.sum(tl.where(real, ratio / mass_a - log_a + log_b, 0.0)))
    tl.store(lse_teacher + matrix * positions + rows, log_a, mask=rows < positions)
    tl.store(lse_student + matrix * positions + rows, log_b, mask=rows < positions)


@triton.jit
def _sums(
    teacher,
    student,
    x_i,
    s_i,
    begin_i,
    end_i,
    first,
    last,
    clear_from,
    clear_to,
    length,
    teacher_stride_T,
    student_stride_T,
    teacher_scale,
    student_scale,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_TILE: tl.constexpr,
    STUDENT_TILE: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    RANGES: tl.constexpr,
    STEEP: tl.constexpr,
):
    """Of each row i: sum_j 2^(a' - t^a), sum_j 2^(b' - t^b), sum_j 2^(a' - t^a) (a' - b'), t^a and t^b.

    t is the largest logit where `STEEP`, else 0.
    """
    # above what a column that is not seen is set to, below any logit: a tile of none adds nothing, however a compiler
    # rounds the multiply-add
    top_a = tl.full([ROWS], -1e28 if STEEP else 0.0, tl.float32)
    top_b = tl.full([ROWS], -1e28 if STEEP else 0.0, tl.float32)
    mass_a = tl.zeros([ROWS], tl.float32)
    mass_b = tl.zeros([ROWS], tl.float32)
    ratio = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        x_j = read_vectors(teacher, j, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE, TEACHER_ALIGNED).to(
            student.dtype.element_ty
        )
        s_j = read_vectors(student, j, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE, STUDENT_ALIGNED)
        a = tl.dot(x_i, tl.trans(x_j), input_precision="ieee")
        b = tl.dot(s_i, tl.trans(s_j), input_precision="ieee")
        if start < clear_from or start + COLUMNS > clear_to:
            # finite: an infinite difference times 0 would not be 0
            seen = is_seen(begin_i, end_i, j, RANGES) if MASKED else (j < length)[None, :]
            a = tl.where(seen, a, -1e30)
            b = tl.where(seen, b, -1e30)
        if STEEP:
            # the scale goes into the exponent's multiply-add instead of a pass over the tile
            new_a = tl.maximum(top_a, tl.max(a, 1) * teacher_scale)
            new_b = tl.maximum(top_b, tl.max(b, 1) * student_scale)
            kept = tl.exp2(top_a - new_a)
            mass = tl.exp2(a * teacher_scale - new_a[:, None])
            mass_a = mass_a * kept + tl.sum(mass, 1)
            ratio = ratio * kept + tl.sum(mass * (a * teacher_scale - b * student_scale), 1)
            mass_b = mass_b * tl.exp2(top_b - new_b) + tl.sum(tl.exp2(b * student_scale - new_b[:, None]), 1)
            top_a = new_a
            top_b = new_b
        else:
            a = a * teacher_scale
            b = b * student_scale
            mass = tl.exp2(a)
            mass_a += tl.sum(mass, 1)
            ratio += tl.sum(mass * (a - b), 1)
            mass_b += tl.sum(tl.exp2(b), 1)
    return mass_a, mass_b, ratio, top_a, top_b


@triton.jit
def seen_columns(begins, ends, row, rows, length, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """From where to where the columns reach that each of a program's rows sees."""
    begin_i = tl.zeros_like(rows)
    end_i = tl.zeros_like(rows) + length
    if RANGES:
        begin_i = tl.load(begins + row + rows, mask=rows < length, other=0)
        end_i = tl.load(ends + row + rows, mask=rows < length, other=0)
    if CAUSAL:
        end_i = tl.minimum(end_i, rows + 1)
    return begin_i, end_i


@triton.jit
def visited_columns(begin_i, end_i, real, length, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """From where, at the edge of a tile, to where some row sees columns, and from where to where all rows do."""
    first = 0
    clear_from = 0
    if RANGES:
        first = tl.min(tl.where(real, begin_i, length)) // COLUMNS * COLUMNS
        clear_from = tl.max(tl.where(real, begin_i, 0))
    last = tl.max(tl.where(real, end_i, 0))
    clear_to = length
    if CAUSAL or RANGES:
        clear_to = tl.min(tl.where(real, end_i, length))
    return first, last, clear_from, clear_to


@triton.jit
def is_seen(begin_i, end_i, j, RANGES: tl.constexpr):
    """Whether each of a program's rows sees each of some columns."""
    seen = j[None, :] < end_i[:, None]
    return seen & (j[None, :] >= begin_i[:, None]) if RANGES else seen


@triton.jit
def read_vectors(vectors, positions, length, stride_T, WIDTH: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """The vectors at some positions; zeros at those that are not real, and beyond the width."""
    components = tl.arange(0, TILE)
    there = (positions < length)[:, None] & (components < WIDTH)[None, :]
    return tl.load(vectors + positions[:, None] * (stride_T * ALIGNED) + components[None, :], mask=there, other=0.0)
