"""The backward pass of the relation loss in Triton.

In the notation of triton_relation.py the gradient is a product with a symmetric matrix,

    d sum KL / d s_i = 1/sqrt(d_S) sum_j W_ij s_j,   W_ij = S_ij + S_ji - P_ij - P_ji,   S_ij = 2^(b'_ij - L^b_i)

of which both directions of a pair follow from one pair of logits and the log-sum-exps of both positions:

    W_ij = 2^b' (2^-L^b_i + 2^-L^b_j) - 2^a' (2^-L^a_i + 2^-L^a_j)

takes two exponentials where 2^L stays within float32, which is decided matrix by matrix; elsewhere each of the four
terms takes its own. Under a causal mask one direction of a pair is 0, but on the diagonal, where both are equal: the
log-sum-exp of whichever position sees the other decides, in two exponentials whatever its size.

The work is shared among programs in one of two ways. `SYMMETRIC`: a program takes a whole matrix, run by run of its
rows, each from the diagonal on, and adds W s to these rows and W^T s to those that are its columns. Every W_ij is
computed once, which halves the work where matrices are enough to occupy a GPU. Else a program takes one run of rows,
with all columns. No program adds to what another one writes, so results repeat exactly.

Tiles without a pair of one segment are skipped. Gradients of positions beyond the length are written as zeros: every
place of an output is written.
"""

import triton
import triton.language as tl

from student_train.kernels.triton_relation import is_seen, read_vectors, seen_columns, visited_columns


@triton.jit
def relation_backward(
    teacher,
    student,
    lengths,
    begins,
    ends,
    of_teacher,
    of_student,
    are_gentle,
    grad,
    sums,
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
    TEACHER_ALIGNED: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """`grad * factor * sum_j W_ij s_j`.

    Of each position it reads 2^-L where its matrix is among those that `are_gentle`, else L, as under a causal mask.
    `sums`, [N, T, STUDENT_WIDTH], have to be zeros if `SYMMETRIC`, and are not read otherwise.
    """
    runs = 1 if SYMMETRIC else tl.cdiv(positions, ROWS)
    matrix = (tl.program_id(0) // runs).to(tl.int64)
    from_row = tl.program_id(0) % runs * ROWS
    to_row = positions if SYMMETRIC else from_row + 1
    batch = matrix // heads
    head = matrix % heads
    length = tl.minimum(tl.load(lengths + batch), positions).to(tl.int32)
    teacher += (batch * teacher_stride_B + head * teacher_stride_A) * TEACHER_ALIGNED
    student += (batch * student_stride_B + head * student_stride_A) * STUDENT_ALIGNED
    gradient += (batch * gradient_stride_B + head * gradient_stride_A) * STUDENT_ALIGNED
    sums += matrix * positions * STUDENT_WIDTH
    gentle = False
    if not CAUSAL:
        gentle = tl.load(are_gentle + matrix) != 0
    of_teacher += matrix * positions
    of_student += matrix * positions
    # beside the diagonal a causal mask takes more registers
    OWN_COLUMNS: tl.constexpr = 32 if CAUSAL and COLUMNS > 32 else COLUMNS
    components = tl.arange(0, STUDENT_TILE)[None, :]
    for first in range(from_row, to_row, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = rows < length
        begin_i, end_i = seen_columns(begins, ends, batch * positions, rows, length, False, RANGES)
        # under a causal mask too: those that see a row lie behind it
        start, stop, clear_from, clear_to = visited_columns(begin_i, end_i, real, length, COLUMNS, False, RANGES)
        total = tl.zeros([ROWS, STUDENT_TILE], tl.float32)
        x_i = read_vectors(teacher, rows, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE, TEACHER_ALIGNED)
        s_i = read_vectors(student, rows, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE, STUDENT_ALIGNED)
        a_i = tl.load(of_teacher + rows, mask=real, other=0.0)[:, None]
        b_i = tl.load(of_student + rows, mask=real, other=0.0)[:, None]
        if SYMMETRIC:
            # what earlier rows added has arrived, all of it before what these rows add
            tl.debug_barrier()
            total = _add_columns(
                total, sums, teacher, student, x_i.to(s_i.dtype), s_i, of_teacher, of_student, a_i, b_i, begin_i, end_i,
                rows, first, tl.minimum(first + ROWS, stop), clear_from, clear_to, length, gentle,
                teacher_stride_T, student_stride_T, teacher_scale, student_scale,
                TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, TEACHER_ALIGNED, STUDENT_ALIGNED,
                OWN_COLUMNS, False, CAUSAL, RANGES,
            )  # fmt: skip
            start = first + ROWS
        total = _add_columns(
            total, sums, teacher, student, x_i.to(s_i.dtype), s_i, of_teacher, of_student, a_i, b_i, begin_i, end_i,
            rows, start, stop, clear_from, clear_to, length, gentle,
            teacher_stride_T, student_stride_T, teacher_scale, student_scale,
            TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_TILE, STUDENT_TILE, TEACHER_ALIGNED, STUDENT_ALIGNED,
            COLUMNS, SYMMETRIC, CAUSAL, RANGES,
        )  # fmt: skip
        if SYMMETRIC:
            total += read_vectors(sums, rows, length, 1, STUDENT_WIDTH, STUDENT_TILE, STUDENT_WIDTH)
        total = tl.where(real[:, None], total * (tl.load(grad) * factor / lift(student)), 0.0)
        tl.store(
            gradient + rows[:, None] * (gradient_stride_T * STUDENT_ALIGNED) + components,
            total.to(gradient.dtype.element_ty),
            mask=(rows < positions)[:, None] & (components < STUDENT_WIDTH),
        )


@triton.jit
def _add_columns(
    total,
    sums,
    teacher,
    student,
    x_i,
    s_i,
    of_teacher,
    of_student,
    a_i,
    b_i,
    begin_i,
    end_i,
    rows,
    start,
    stop,
    clear_from,
    clear_to,
    length,
    gentle,
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
    COLUMNS: tl.constexpr,
    BEHIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """`total` with W s_j added for some columns j; where all are `BEHIND` the rows, W^T s_i is added to `sums`."""
    components = tl.arange(0, STUDENT_TILE)[None, :]
    for column in range(start, stop, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        x_j = read_vectors(teacher, j, length, teacher_stride_T, TEACHER_WIDTH, TEACHER_TILE, TEACHER_ALIGNED)
        s_j = read_vectors(student, j, length, student_stride_T, STUDENT_WIDTH, STUDENT_TILE, STUDENT_ALIGNED)
        a_j = tl.load(of_teacher + j, mask=j < length, other=0.0)[None, :]
        b_j = tl.load(of_student + j, mask=j < length, other=0.0)[None, :]
        a = tl.dot(x_i, tl.trans(x_j.to(s_j.dtype)), input_precision="ieee") * teacher_scale
        b = tl.dot(s_i, tl.trans(s_j), input_precision="ieee") * student_scale
        # positions of padding need no mask: their vectors are 0, and the weights are finite, since no log-sum-exp is
        # less than the logit on the diagonal, a square
        if CAUSAL:
            if BEHIND:
                weight = tl.exp2(b - b_j) - tl.exp2(a - a_j)
            else:
                before = rows[:, None] >= j[None, :]
                weight = tl.exp2(b - tl.where(before, b_i, b_j)) - tl.exp2(a - tl.where(before, a_i, a_j))
                weight = tl.where(rows[:, None] == j[None, :], 2 * weight, weight)
        elif gentle:
            weight = tl.exp2(b) * (b_i + b_j) - tl.exp2(a) * (a_i + a_j)
        else:
            weight = tl.exp2(b - b_i) + tl.exp2(b - b_j) - tl.exp2(a - a_i) - tl.exp2(a - a_j)
        if RANGES:  # noqa: SIM102 - of one that the compiler knows and one that it does not
            if column < clear_from or column + COLUMNS > clear_to:
                # out of range these may be infinite, and their difference no number
                weight = tl.where(is_seen(begin_i, end_i, j, True), weight, 0.0)
        rounded = (weight * lift(student)).to(s_j.dtype)
        total = tl.dot(rounded, s_j, total, input_precision="ieee")
        if BEHIND:
            tl.atomic_add(
                sums + j[:, None] * STUDENT_WIDTH + components,
                tl.dot(tl.trans(rounded), s_i, input_precision="ieee"),
                mask=(j < length)[:, None] & (components < STUDENT_WIDTH),
                sem="relaxed",
                scope="cta",
            )
    return total


@triton.jit
def lift(student):
    """What weights are multiplied with: their differences in long rows are below float16's smallest number."""
    # the largest weight is 2
    return 4096.0 if student.dtype.element_ty == tl.float16 else 1.0
