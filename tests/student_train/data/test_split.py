import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.data.split import abreast, block_pieces, held_out_rows, share_out, split_rows
from teacher_cache.errors import SettingsError

CASES = [(2000, 0.02, 40), (10, 0.02, 1), (100, 0.25, 25), (3, 0.5, 2), (2, 0, 1)]


@pytest.mark.parametrize("rows, share, expected", CASES)
def test_the_share_is_rounded_and_never_empty(rows, share, expected):
    assert held_out_rows(rows, share) == expected


@pytest.mark.parametrize("rows, share", [(1, 0.02), (10, 0.99)])
def test_a_store_with_nothing_left_to_train_on_is_refused(rows, share):
    with pytest.raises(SettingsError, match=f"{rows} rows and --valid-share {share}"):
        held_out_rows(rows, share)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.data())
def test_shares_are_whole_add_up_and_are_in_proportion(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    shares = share_out(count, sizes)
    assert sum(shares) == count
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size
        assert abs(share - count * size / sum(sizes)) < 1


def test_each_store_gives_its_last_rows():
    assert share_out(5, [101]) == (5,)
    assert split_rows([101], [5]) == ((range(96),), (range(96, 101),))
    assert share_out(6, [100, 50, 2]) == (3, 2, 1)
    training, held_out = split_rows([100, 50, 2], (3, 2, 1))
    assert training == (range(97), range(100, 148), range(150, 151))
    assert held_out == (range(97, 100), range(148, 150), range(151, 152))
    assert split_rows([4, 2, 3], [0, 2, 1]) == ((range(4), range(6, 8)), (range(4, 6), range(8, 9)))


def test_half_of_the_places_are_half_of_every_store():
    assert list(abreast((range(7, 12),)).items()) == [(row, row - 7) for row in range(7, 12)]
    places = abreast((range(8), range(20, 24)))
    assert sorted(places.values()) == list(range(12))
    assert {row for row, place in places.items() if place < 6} == {0, 1, 2, 3, 20, 21}
    assert {row for row, place in places.items() if place < 3} == {0, 1, 20}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_pieces_are_the_rows_block_by_block(sizes, data):
    bounds = np.cumsum([0, *sizes])
    borders = sorted(data.draw(st.sets(st.integers(0, sum(sizes)), min_size=2)))
    rows = tuple(range(*pair) for pair in zip(borders[::2], borders[1::2], strict=False))
    found = []
    for block, start, stop in block_pieces(bounds, rows).tolist():
        assert bounds[block] <= start < stop <= bounds[block + 1]
        found += range(start, stop)
    assert found == [row for run in rows for row in run]
