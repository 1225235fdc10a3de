import pytest

from student_train.split import held_out_rows
from teacher_cache.errors import SettingsError

CASES = [(2000, 0.02, 40), (10, 0.02, 1), (100, 0.25, 25), (3, 0.5, 2), (2, 0, 1)]


@pytest.mark.parametrize("rows, share, expected", CASES)
def test_the_share_is_rounded_and_never_empty(rows, share, expected):
    assert held_out_rows(rows, share) == expected


@pytest.mark.parametrize("rows, share", [(1, 0.02), (10, 0.99)])
def test_a_store_with_nothing_left_to_train_on_is_refused(rows, share):
    with pytest.raises(SettingsError, match=f"{rows} rows and --valid-share {share}"):
        held_out_rows(rows, share)
