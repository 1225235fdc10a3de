"""Flags of `kdeval perplexity` that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.evaluate.perplexity.settings import PerplexitySettings, check_stride
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"text": ()}, "--text names nothing"),
        ({"seq_len": 1}, "--seq-len 1 "),
        ({"batch_size": 0}, "--batch-size 0 "),
        ({"max_tokens": 1}, "--max-tokens 1 "),
        ({"stride": 0}, "--stride 0 "),
        ({"seq_len": 8, "stride": 8}, "--stride 8 goes past windows of 8 tokens.*at most 7"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PerplexitySettings(**{"text": ("a",), **flags})


def test_what_goes() -> None:
    PerplexitySettings(text=("a",), seq_len=2, stride=1, max_tokens=2)
    check_stride(7, 8)
    check_stride(100, None)
