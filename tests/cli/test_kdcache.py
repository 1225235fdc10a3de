"""`kdcache` without a command that it knows, or with flags that its command does not."""

from __future__ import annotations

import pytest

from cli import kdcache


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["build", "--teacher", "x", "--no-such-flag"],
        ["bake"],
        ["build", "--teacher", "x", "--seq-len", "many"],
    ):
        with pytest.raises(SystemExit) as stopped:
            kdcache.main(words)
        assert stopped.value.code == 2
