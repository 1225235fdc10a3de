"""What --vocabulary says."""

from __future__ import annotations

import pytest

from student_train.settings import TrainSettings
from student_train.vocabulary_choice import read_vocabulary
from teacher_cache.errors import SettingsError


def test_grammar() -> None:
    assert read_vocabulary("all").all
    assert read_vocabulary("trim:C:/text.txt").files == ("C:/text.txt",)
    assert read_vocabulary("trim:de.txt,en.txt.gz").files == ("de.txt", "en.txt.gz")
    assert read_vocabulary("coverage:1").share == 1
    assert read_vocabulary("coverage:0.9999").share == 0.9999


@pytest.mark.parametrize(
    "text",
    [
        "",
        "trim",
        "trim:",
        "trim:a.txt,",
        "trim:a.txt,b.json",
        "coverage",
        "coverage:",
        "coverage:0",
        "coverage:1.1",
        "coverage:nan",
        "some",
        "all:1",
    ],
)
def test_what_cannot_be_read_is_told_at_once(text: str) -> None:
    with pytest.raises(SettingsError, match="--vocabulary"):
        TrainSettings(method="hs", vocabulary=text)
