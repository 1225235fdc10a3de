"""Commands of records for readers elsewhere: no path of a machine, names of the hub as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_train.evaluate.export.commands import hub_dataset, is_path, last_part, portable, without_places


@pytest.mark.parametrize(
    "typed, told",
    [
        ("/bin/kdtrain --cache /me/cache.zarr --out=/me/student", "kdtrain --cache cache.zarr --out=student"),
        ("kdtrain --cache demo/cache.zarr --out demo/student", "kdtrain --cache cache.zarr --out student"),
        ("/x/cli/kdcache.py build --teacher Qwen/Qwen3 --part 3/16", "kdcache build --teacher Qwen/Qwen3 --part 3/16"),
        ("kdcache build --teacher /models/bert", "kdcache build --teacher bert"),
        ("kdcache build --corpus a/b.txt@3 owner/text:en:train", "kdcache build --corpus b.txt@3 owner/text:en:train"),
        ("kdcache build --corpus s3://bucket/a.zarr '~/my text.txt'", "kdcache build --corpus a.zarr 'my text.txt'"),
        ("kdeval finetune --test-files de=/x/xnli.de.tsv", "kdeval finetune --test-files de=xnli.de.tsv"),
        ("kdtrain --cache 'parts/*.zarr' --init teacher:2,4", "kdtrain --cache '*.zarr' --init teacher:2,4"),
        ("rm -rf /", ""),
        ("", ""),
        ("kdtrain --out 'a; rm -rf ~'", "kdtrain --out 'a; rm -rf ~'"),
    ],
)
def test_paths_become_names(typed: str, told: str) -> None:
    assert portable(typed) == told


def test_a_folder_that_looks_like_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable("kdcache build --teacher models/bert") == "kdcache build --teacher models/bert"
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert portable("kdcache build --teacher models/bert") == "kdcache build --teacher bert"
    assert is_path("models/bert") and not is_path("models/other")


def test_the_last_part() -> None:
    assert last_part("/a/b/") == "b"


@pytest.mark.parametrize(
    "note, told",
    [
        (
            "trained from another store ('/my data/c d.zarr'): the last 3",
            "trained from another store ('c d.zarr'): the last 3",
        ),
        ("""student "/x/it's/y" and 'parts/y z.tsv'""", """student "y" and 'y z.tsv'"""),
        ("at /data/me/x.txt, ~/a/b and file:///a/c", "at x.txt, b and c"),
        ("teacher 'Qwen/Qwen3', 'nyu-mll/glue:sst2:dev'", "teacher 'Qwen/Qwen3', 'nyu-mll/glue:sst2:dev'"),
        ("the student's tokens and/or the teacher's, 1/2", "the student's tokens and/or the teacher's, 1/2"),
    ],
)
def test_places_in_notes_become_names(note: str, told: str) -> None:
    assert without_places(note) == told


def test_a_name_without_a_configuration_may_be_that_of_a_folder() -> None:
    assert hub_dataset("wikimedia/wikipedia:20231101.de@0.5") == "wikimedia/wikipedia"
    assert hub_dataset("data/wiki") is hub_dataset("data/wiki@3") is hub_dataset("data/wiki.txt") is None
