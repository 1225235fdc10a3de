"""Commands behind a model: from its stores on, each once, with what derived them and what trimmed it."""

from __future__ import annotations

from pathlib import Path

from student_train.evaluate.making import commands_behind, store_commands
from tests.student_train.evaluate.left_records import write


def test_in_order_and_from_the_store_on(tmp_path: Path) -> None:
    provenance = {"command": "kdtrain --out student"}
    assert commands_behind(["kdcache build"], provenance, tmp_path) == ["kdcache build", "kdtrain --out student"]
    assert commands_behind([None], {}, tmp_path) == []
    several = {"command": "a", "stores": [{"command": "a"}, {"command": "b"}, {}]}
    assert (store_commands(several), store_commands({"command": "a"}), store_commands({})) == (["a", "b"], ["a"], [])


def test_a_store_that_was_derived_twice(tmp_path: Path) -> None:
    built = "a.zarr was made 2026-01-01T00:00:00+00:00 by: kdcache build --out a.zarr"
    derived = f"kdcache derive b.zarr c.zarr; b.zarr was made 2026-01-02 by: kdcache derive a.zarr b.zarr; {built}"
    commands = ["kdcache build --out a.zarr", "kdcache derive a.zarr b.zarr", "kdcache derive b.zarr c.zarr"]
    assert commands_behind([derived, derived], {}, tmp_path) == commands


def test_a_trimmed_model(tmp_path: Path) -> None:
    provenance = {"command": "kdtrain", "vocabulary": {"trimmed": {"command": "kdeval trim --text de.txt"}}}
    assert commands_behind([], provenance, tmp_path) == ["kdtrain", "kdeval trim --text de.txt"]
    write(tmp_path / "trim.json", {"evaluation": "trim", "command": "kdeval trim --text de.txt"})
    assert commands_behind([], provenance, tmp_path) == ["kdtrain", "kdeval trim --text de.txt"]
    assert commands_behind([], {"vocabulary": {"choice": "coverage:1"}}, tmp_path) == ["kdeval trim --text de.txt"]
