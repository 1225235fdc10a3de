"""What a build reads, loaded and ready to run; no store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.build.inputs import Silent, pack_rows
from teacher_cache.build.settings import BuildSettings
from teacher_cache.corpus.corpus import Rows
from teacher_cache.teacher.teacher import Teacher


@pytest.fixture(scope="session")
def small_teacher(tiny_teacher: Callable[..., Path]) -> Teacher:
    """A tiny BERT whose attention can be read, started. Shared: nothing may be changed about it."""
    teacher = Teacher.load(str(tiny_teacher("bert")), device="cpu")
    teacher.tap()
    teacher.start()
    return teacher


@pytest.fixture(scope="session")
def small_rows(
    small_settings: Callable[..., BuildSettings], small_teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> Rows:
    """40 rows of 24 positions."""
    return pack_rows(small_settings(tmp_path_factory.mktemp("no-store")), small_teacher, 24, Silent())


class Notes(Silent):
    """Keeps what a build says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def notes() -> Any:
    """A `BuildProgress` whose `lines` are what it was told."""
    return Notes()
