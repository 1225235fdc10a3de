"""What the benchmark of multilingual students computes of embeddings, beside a loop over pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
LANGUAGES = ("de", "en", "ko")


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import multilingual_students

    return multilingual_students.follow


def some_embeddings(draw: np.random.Generator) -> dict[str, Vectors]:
    found = {language: draw.normal(size=(5, 8)) for language in LANGUAGES}
    return {language: vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for language, vectors in found.items()}


def test_cosines_across_languages_are_those_of_every_pair(follow: Any) -> None:
    draw = np.random.default_rng(0)
    teacher, student = some_embeddings(draw), some_embeddings(draw)
    cosines: list[list[float]] = [[], []]
    for place, first in enumerate(LANGUAGES):
        for second in LANGUAGES[place + 1 :]:
            for a in range(5):
                for b in range(5):
                    for one, found in zip((student, teacher), cosines, strict=True):
                        found.append(float(one[first][a] @ one[second][b]))
    found = follow(student, teacher)
    assert found["across"] == pytest.approx(float(np.corrcoef(*cosines)[0, 1]))
    own = [float(student[language][place] @ teacher[language][place]) for language in LANGUAGES for place in range(5)]
    assert found["cosine"] == pytest.approx(np.mean(own))


def test_a_space_that_is_only_turned_is_followed(follow: Any) -> None:
    draw = np.random.default_rng(1)
    teacher = some_embeddings(draw)
    turn = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    turned = follow({language: vectors @ turn for language, vectors in teacher.items()}, teacher)
    assert turned["across"] == pytest.approx(1) and abs(turned["cosine"]) < 0.9
    assert follow(teacher, teacher) == pytest.approx({"cosine": 1, "across": 1})
