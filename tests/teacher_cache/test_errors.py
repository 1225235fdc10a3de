"""What an error says in one line, and that users can mend each kind of them."""

from __future__ import annotations

import inspect

import pytest

from teacher_cache import errors
from teacher_cache.errors import DistillationError, first_line


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one  "),
        (ValueError(""), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError(2, "No such file", "a\nb"), "[Errno 2] No such file: 'a\\nb'"),
    ],
)
def test_the_first_line_of_what_an_error_says(error: BaseException, line: str) -> None:
    assert first_line(error) == line


def test_every_kind_of_error_is_one_that_the_command_line_prints() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) > 5 and all(issubclass(kind, DistillationError) for kind in kinds)
    assert all(kind.__doc__ for kind in kinds)
