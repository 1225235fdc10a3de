"""The two Triton kernels of the relation loss: a program computes a run of rows i of one matrix, over all columns j.

Logits of both models are kept in powers of two, a' = a log2(e) (the scales hold that factor), so that an exponential is
one instruction, and so are the log-sum-exps L^a and L^b that the first kernel leaves for the second. With s_i the
student's vectors,

    forward:    KL_i / log(2) = sum_j P_ij (a'_ij - b'_ij) - L^a_i + L^b_i,   P_ij = 2^(a'_ij - L^a_i)
    backward:   d sum KL / d s_i = 1/sqrt(d_S) sum_j (S_ij + S_ji - P_ij - P_ji) s_j,   S_ij = 2^(b'_ij - L^b_i)

Logits are symmetric, so S_ji = 2^(b'_ij - L^b_j) needs no more than the other position's log-sum-exp: programs are
independent, nothing is added up between them, and results repeat exactly. The forward pass takes two exponentials per
pair. So does the backward pass, where S_ij + S_ji = S_ij (1 + 2^L_i 2^-L_j) stays within float32, which is decided
matrix by matrix; elsewhere it takes four.

Of rows in segments (`RANGES`) each position sees those from the start of its segment to the end of it, under a causal
mask to itself. Tiles that no row of a program sees are skipped, in the others what is not seen has no weight. Under a
causal mask one of S_ij and S_ji is 0 but on the diagonal, where they are equal: the log-sum-exp of whichever position
sees the other decides, in two exponentials whatever its size.

Head widths are padded with zeros to the width of a tile. Positions beyond the length are read as zeros and their
gradients written as zeros: every place of an output is written. Tiles beyond the length are skipped.

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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """Sum of KL_i / log(2) over each program's rows, and both log-sum-exps of each row."""
    matrix, rows, columns, length = _place(lengths, heads, positions, ROWS)
    begin_i, end_i = _segments(begins, ends, matrix // heads * positions, rows, length, positions, RANGES)
    from_column, to_column = _visited(begin_i, end_i, rows, columns, COLUMNS, CAUSAL, RANGES)
    teacher += matrix // heads * teacher_stride_B + matrix % heads * teacher_stride_A
    student += matrix // heads * student_stride_B + matrix % heads * student_stride_A
    x_i = _vectors(teacher, rows, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE).to(student.dtype.element_ty)
    s_i = _vectors(student, rows, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE)
    # above what a column that is not seen is set to, below any logit: a tile of none adds nothing, however a compiler
    # rounds the multiply-add
    top_a = tl.full([ROWS], -1e28, tl.float32)
    top_b = tl.full([ROWS], -1e28, tl.float32)
    mass_a = tl.zeros([ROWS], tl.float32)
    mass_b = tl.zeros([ROWS], tl.float32)
    ratio = tl.zeros([ROWS], tl.float32)
    for first in range(from_column, to_column, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        x_j = _vectors(teacher, j, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE).to(student.dtype.element_ty)
        s_j = _vectors(student, j, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE)
        a = tl.dot(x_i, tl.trans(x_j), input_precision="ieee")
        b = tl.dot(s_i, tl.trans(s_j), input_precision="ieee")
        if CAUSAL or RANGES:
            # what a row sees of its first tiles may be nothing, which counts 0
            seen = _seen(rows, j, begin_i, end_i, CAUSAL, RANGES)
            a = tl.where(seen, a, -1e30)
            b = tl.where(seen, b, -1e30)
        elif first + COLUMNS > length:
            # finite: an infinite difference times 0 would not be 0
            a = tl.where((j < length)[None, :], a, -1e30)
            b = tl.where((j < length)[None, :], b, -1e30)
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
    real = rows < length
    mass_a = tl.where(real, mass_a, 1.0)
    log_a = tl.where(real, top_a + tl.log2(mass_a), 0.0)
    log_b = tl.where(real, top_b + tl.log2(tl.where(real, mass_b, 1.0)), 0.0)
    tl.store(kl_parts + tl.program_id(0), tl.sum(tl.where(real, ratio / mass_a - log_a + log_b, 0.0)))
    tl.store(lse_teacher + matrix * positions + rows, log_a, mask=rows < positions)
    tl.store(lse_student + matrix * positions + rows, log_b, mask=rows < positions)


@triton.jit
def relation_backward(
    teacher,
    student,
    lengths,
    begins,
    ends,
    lse_teacher,
    lse_student,
    inverse_teacher,
    inverse_student,
    largest_lse,
    grad,
    gradient,
    heads,
    positions,
    teacher_stride_B,
    teacher_stride_A,
    teacher_stride_T,
    student_stride_B,
    student_stride_A,
    student_stride_T,
    gradient_stride_B,
    gradient_stride_A,
    gradient_stride_T,
    teacher_scale,
    student_scale,
    factor,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_TILE: tl.constexpr,
    STUDENT_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """`grad * factor * sum_j (S_ij + S_ji - P_ij - P_ji) s_j` of each program's rows; inverse means 2^-L."""
    matrix, rows, columns, length = _place(lengths, heads, positions, ROWS)
    begin_i, end_i = _segments(begins, ends, matrix // heads * positions, rows, length, positions, RANGES)
    # those that see a row lie behind it
    from_column, to_column = _visited(begin_i, end_i, rows, columns, COLUMNS, False, RANGES)
    teacher += matrix // heads * teacher_stride_B + matrix % heads * teacher_stride_A
    student += matrix // heads * student_stride_B + matrix % heads * student_stride_A
    gradient += matrix // heads * gradient_stride_B + matrix % heads * gradient_stride_A
    lse_teacher += matrix * positions
    lse_student += matrix * positions
    if CAUSAL:
        total = _weighted_sum(
            teacher, student, lse_teacher, lse_student, lse_teacher, lse_student, begin_i, end_i,
            rows, from_column, to_column, length, teacher_stride_T, student_stride_T, teacher_scale, student_scale,
            TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, ROWS, COLUMNS, False, True, RANGES,
        )  # fmt: skip
    # 2^L must not overflow, nor S_ij lose bits below float32's smallest number where S_ji counts
    elif tl.load(largest_lse + matrix) < 100:
        total = _weighted_sum(
            teacher, student, lse_teacher, lse_student,
            inverse_teacher + matrix * positions, inverse_student + matrix * positions, begin_i, end_i,
            rows, from_column, to_column, length, teacher_stride_T, student_stride_T, teacher_scale, student_scale,
            TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, ROWS, COLUMNS, True, False, RANGES,
        )  # fmt: skip
    else:
        total = _weighted_sum(
            teacher, student, lse_teacher, lse_student, lse_teacher, lse_student, begin_i, end_i,
            rows, from_column, to_column, length, teacher_stride_T, student_stride_T, teacher_scale, student_scale,
            TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, ROWS, COLUMNS, False, False, RANGES,
        )  # fmt: skip
    total = tl.where((rows < length)[:, None], total * (tl.load(grad) * factor), 0.0)
    components = tl.arange(0, STUDENT_TILE)
    tl.store(
        gradient + rows[:, None] * gradient_stride_T + components[None, :],
        total.to(gradient.dtype.element_ty),
        mask=(rows < positions)[:, None] & (components < STUDENT_WIDTH)[None, :],
    )


@triton.jit
def _weighted_sum(
    teacher,
    student,
    lse_teacher,
    lse_student,
    of_column_teacher,
    of_column_student,
    begin_i,
    end_i,
    rows,
    from_column,
    to_column,
    length,
    teacher_stride_T,
    student_stride_T,
    teacher_scale,
    student_scale,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_TILE: tl.constexpr,
    STUDENT_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GENTLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """The sum over j. Of each column, its 2^-L is read where `GENTLE`, else its L."""
    x_i = _vectors(teacher, rows, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE).to(student.dtype.element_ty)
    s_i = _vectors(student, rows, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE)
    log_a_i = tl.load(lse_teacher + rows, mask=rows < length, other=0.0)[:, None]
    log_b_i = tl.load(lse_student + rows, mask=rows < length, other=0.0)[:, None]
    total = tl.zeros([ROWS, STUDENT_TILE], tl.float32)
    # differences of weights of long rows are below float16's smallest number; the largest weight is 2
    LIFT: tl.constexpr = 4096.0 if student.dtype.element_ty == tl.float16 else 1.0
    for first in range(from_column, to_column, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        x_j = _vectors(teacher, j, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE).to(student.dtype.element_ty)
        s_j = _vectors(student, j, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE)
        a_j = tl.load(of_column_teacher + j, mask=j < length, other=0.0)[None, :]
        b_j = tl.load(of_column_student + j, mask=j < length, other=0.0)[None, :]
        a = tl.dot(x_i, tl.trans(x_j), input_precision="ieee") * teacher_scale
        b = tl.dot(s_i, tl.trans(s_j), input_precision="ieee") * student_scale
        # columns of padding need no mask: s_j is 0 there, and the weights are finite, since no log-sum-exp is less than
        # the logit on the diagonal, a square
        if CAUSAL:
            before = rows[:, None] >= j[None, :]
            twice = tl.where(rows[:, None] == j[None, :], 2.0, 1.0)
            p = twice * tl.exp2(a - tl.where(before, log_a_i, a_j))
            s = twice * tl.exp2(b - tl.where(before, log_b_i, b_j))
        elif GENTLE:
            p = tl.exp2(a - log_a_i) * (1 + tl.exp2(log_a_i) * a_j)
            s = tl.exp2(b - log_b_i) * (1 + tl.exp2(log_b_i) * b_j)
        else:
            p = tl.exp2(a - log_a_i) + tl.exp2(a - a_j)
            s = tl.exp2(b - log_b_i) + tl.exp2(b - b_j)
        weight = s - p
        if RANGES:
            # out of range these may be infinite, and their difference no number
            weight = tl.where(_seen(rows, j, begin_i, end_i, False, True), weight, 0.0)
        total = tl.dot((weight * LIFT).to(s_j.dtype), s_j, total, input_precision="ieee")
    return total / LIFT


@triton.jit
def _place(lengths, heads, positions, ROWS: tl.constexpr):
    """This program's matrix, its rows, the columns that it has to visit, and the matrix's real positions."""
    runs = tl.cdiv(positions, ROWS)
    matrix = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * ROWS
    length = tl.minimum(tl.load(lengths + matrix // heads), positions).to(tl.int32)
    return matrix, first + tl.arange(0, ROWS), tl.where(first < length, length, 0), length


@triton.jit
def _segments(begins, ends, row, rows, length, positions, RANGES: tl.constexpr):
    """From where to where the segment of each of a program's rows reaches; nowhere for rows of padding."""
    if RANGES:
        return (
            tl.load(begins + row + rows, mask=rows < length, other=positions),
            tl.load(ends + row + rows, mask=rows < length, other=0),
        )
    return rows, rows


@triton.jit
def _visited(begin_i, end_i, rows, columns, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """The columns that some row of a program sees: from the first to the last, in whole tiles."""
    first = 0
    last = columns
    if RANGES:
        first = tl.min(begin_i) // COLUMNS * COLUMNS
        last = tl.minimum(tl.max(end_i), columns)
    if CAUSAL:
        last = tl.minimum(tl.max(rows) + 1, last)
    return first, last


@triton.jit
def _seen(rows, j, begin_i, end_i, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """Whether each of a program's rows sees each of some columns."""
    before = rows[:, None] >= j[None, :]
    if RANGES:
        inside = (j[None, :] >= begin_i[:, None]) & (j[None, :] < end_i[:, None])
        return inside & before if CAUSAL else inside
    return before


@triton.jit
def _vectors(vectors, positions, length, stride_T, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The vectors at some positions; zeros at those that are not real, and beyond the width."""
    components = tl.arange(0, TILE)
    there = (positions < length)[:, None] & (components < WIDTH)[None, :]
    return tl.load(vectors + positions[:, None] * stride_T + components[None, :], mask=there, other=0.0)
