"""Flags of `kdeval lm-eval`: names of tasks however they are joined, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.evaluate.lm_eval.settings import LmEvalSettings
from teacher_cache.errors import SettingsError


def test_names_of_tasks() -> None:
    assert LmEvalSettings(tasks=("a,b", "c", "a, d")).chosen_tasks() == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"tasks": (",",)}, "--tasks names nothing"),
        ({"num_fewshot": -1}, "--num-fewshot -1 "),
        ({"limit": 0}, "--limit 0 "),
        ({"batch_size": 0}, "--batch-size 0 "),
        ({"include_path": "nowhere"}, "--include-path 'nowhere' is no folder"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LmEvalSettings(**{"tasks": ("a",), **flags})
