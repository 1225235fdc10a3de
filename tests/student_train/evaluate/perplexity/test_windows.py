"""Windows: every token of a document is predicted once, after as much context as promised."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from student_train.evaluate.perplexity.windows import Window, batches, windows

START = -1


@given(
    length=st.integers(0, 60), seq_len=st.integers(2, 20), stride=st.integers(1, 19), start=st.booleans(),
    repeat=st.booleans(),
)  # fmt: skip
def test_every_token_is_predicted_once(length: int, seq_len: int, stride: int, start: bool, repeat: bool) -> None:
    stride = min(stride, seq_len - 1)
    ids = list(range(length))
    found = list(windows(ids, START if start else None, seq_len=seq_len, stride=stride, repeat=repeat))
    predicted = [token for window in found for token in window.ids[len(window.ids) - window.predicted :]]
    assert predicted == (ids if start else ids[1:])
    for place, window in enumerate(found):
        assert 1 <= window.predicted < len(window.ids) <= seq_len
        text = [token for token in window.ids if token != START]
        assert text == list(range(text[0], text[-1] + 1))  # a piece of the document as it is
        assert (window.ids[0] == START) == (start and (place == 0 or repeat))
        if place:
            assert window.predicted <= stride
            assert len(window.ids) - window.predicted >= seq_len - stride


def test_a_short_document_is_one_window() -> None:
    assert list(windows([5, 6, 7], 0, seq_len=4, stride=1)) == [Window((0, 5, 6, 7), 3)]
    assert list(windows([5, 6], None, seq_len=4, stride=1)) == [Window((5, 6), 1)]
    assert list(windows([5], None, seq_len=4, stride=1)) == list(windows([], 0, seq_len=4, stride=1)) == []


def test_a_long_one_by_hand() -> None:
    found = list(windows([1, 2, 3, 4, 5, 6], 0, seq_len=4, stride=2))
    assert found == [Window((0, 1, 2, 3), 3), Window((2, 3, 4, 5), 2), Window((3, 4, 5, 6), 1)]
    again = list(windows([1, 2, 3, 4, 5, 6], 0, seq_len=4, stride=2, repeat=True))
    assert again == [Window((0, 1, 2, 3), 3), Window((0, 3, 4, 5), 2), Window((0, 4, 5, 6), 1)]


@given(lengths=st.lists(st.integers(2, 30), max_size=200), size=st.integers(1, 5))
def test_batches_hold_every_window(lengths: list[int], size: int) -> None:
    given_windows = [Window((0,) * length, 1) for length in lengths]
    found = list(batches(iter(given_windows), size))
    assert all(1 <= len(batch) <= size for batch in found)
    assert sorted(len(window.ids) for batch in found for window in batch) == sorted(lengths)
