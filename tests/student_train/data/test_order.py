"""The order of training rows as pure numbers: epochs, places in the stream, batches of ranks, visits of blocks."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.data.order import ReadingPlan, RowOrder


def rows_of(order, segments):
    return [
        int(order.bounds[segment.block]) + row for segment in segments for row in range(segment.start, segment.stop)
    ]


def make_order(rows, block_rows, seed):
    """Rows of one store in blocks of `block_rows`, the last one short."""
    return RowOrder(rows=(rows,), bounds=np.append(np.arange(0, rows.stop, block_rows), rows.stop), seed=seed)


def make_pool_order(parts, seed):
    """Of each part (its rows, its rows per block, how many of its rows are left out at the end)."""
    bounds, runs, first = [], [], 0
    for rows, block_rows, left_out in parts:
        bounds += range(first, first + rows, block_rows)
        runs.append(range(first, first + rows - min(left_out, rows - 1)))
        first += rows
    return RowOrder(rows=tuple(runs), bounds=np.array([*bounds, first]), seed=seed)


seeds = st.one_of(st.none(), st.integers(0, 5))
orders = st.one_of(
    st.builds(
        lambda start, count, block_rows, seed: make_order(range(start, start + count), block_rows, seed),
        start=st.integers(0, 20),
        count=st.integers(1, 60),
        block_rows=st.integers(1, 16),
        seed=seeds,
    ),
    st.builds(
        make_pool_order,
        st.lists(st.tuples(st.integers(1, 30), st.integers(1, 16), st.integers(0, 5)), min_size=2, max_size=4),
        seeds,
    ),
)


@given(orders, st.integers(0, 3))
def test_an_epoch_is_every_row_once_in_whole_blocks(order, epoch):
    size = sum(map(len, order.rows))
    segments = list(order.segments(epoch * size, (epoch + 1) * size))
    assert sorted(rows_of(order, segments)) == [row for rows in order.rows for row in rows]
    assert len({segment.block for segment in segments}) == len(segments)
    assert {segment.epoch for segment in segments} == {epoch}


@given(orders, st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_the_stream_does_not_depend_on_where_it_is_cut(order, cuts):
    ends = np.cumsum(cuts).tolist()
    pieces = [rows_of(order, order.segments(start, stop)) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
    assert [row for piece in pieces for row in piece] == rows_of(order, order.segments(0, ends[-1]))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    def blocks(seed, epoch):
        order = make_order(range(160), 8, seed)
        return [segment.block for segment in order.segments(160 * epoch, 160 * (epoch + 1))]

    assert blocks(0, 0) == blocks(0, 0) != blocks(0, 1)
    assert blocks(0, 0) != blocks(1, 0)
    assert blocks(None, 0) == blocks(None, 5) == list(range(20))
    # a changed order would silently change every resumed training: these numbers may never change
    assert blocks(0, 0)[:6] == [6, 18, 4, 12, 11, 7]


def plan(order, **options):
    return ReadingPlan(
        **{"order": order, "batch_size": 6, "rank": 0, "world_size": 1, "position": 0, "stop": None, **options}
    )


@given(orders, st.integers(1, 20), st.integers(1, 5), st.integers(0, 100))
def test_batches_are_the_stream_cut_evenly_whatever_the_number_of_ranks(order, batch_size, world_size, position):
    ranks = [
        islice(plan(order, batch_size=batch_size, rank=rank, world_size=world_size, position=position).batches(), 4)
        for rank in range(world_size)
    ]
    for number, shares in enumerate(zip(*ranks, strict=True)):
        first = position + number * batch_size
        assert {share[:2] for share in shares} == {(first, batch_size)}
        parts = [rows_of(order, segments) for _, _, segments in shares]
        assert [row for part in parts for row in part] == rows_of(order, order.segments(first, first + batch_size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_last_batch_before_a_stop_is_short():
    order = make_order(range(20), 8, None)
    found = list(plan(order, batch_size=8, stop=20).batches())
    assert [(first, rows) for first, rows, _ in found] == [(0, 8), (8, 8), (16, 4)]
    assert rows_of(order, found[-1][2]) == [16, 17, 18, 19]
    assert list(plan(order, position=20, stop=20).batches()) == []


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_a_block_is_visited_once_while_batches_cross_it(batch_size):
    order = make_order(range(24), 8, None)
    visits = list(islice(plan(order, batch_size=batch_size).visits(), 6))
    assert visits == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_rank_visits_only_the_blocks_of_its_share():
    order = make_order(range(24), 4, None)
    visits = list(islice(plan(order, batch_size=24, rank=1, world_size=3).visits(), 4))
    assert visits == [(0, 2), (0, 3), (1, 2), (1, 3)]
