"""What a specification finds on the disk, and what it says it has left out."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from teacher_cache.corpus.folders import find_local
from teacher_cache.errors import CorpusError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")


def found_in(spec: str, folder: Path) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    found = find_local(spec)
    found.tell("SPEC", notes.append)
    return [str(path.relative_to(folder)) for path in found.paths], sorted(notes)


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.JSONL.gz", "sub/c.csv", "sub/deep/d.parquet", "e.json")
    make(tmp_path, ".hidden.txt", ".ipynb_checkpoints/b.txt", "sub/.git/x.txt", ".cache/huggingface/y.json", "._b.txt")
    make(tmp_path, "__MACOSX/b.txt", "dataset_info.json", "s/config.json", "_temporary/0.json", "a.tsv", "sub/a.md")
    make(tmp_path.parent / "elsewhere", "z.txt")
    (tmp_path / "link").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "file-link.txt").symlink_to(tmp_path.parent / "elsewhere" / "z.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    paths, notes = found_in(str(tmp_path), tmp_path)
    assert paths == ["a.JSONL.gz", "b.txt", "e.json", "file-link.txt", "sub/c.csv", "sub/deep/d.parquet"]
    assert notes == [
        "left out of SPEC: 2 linking to folders (link, loop)",
        "left out of SPEC: 2 that lead nowhere or are no files (broken.txt, pipe.txt)",
        "left out of SPEC: 2 with other endings (a.tsv, sub/a.md)",
        "left out of SPEC: 4 that describe or accompany data (__MACOSX, _temporary, dataset_info.json, s/config.json)",
        "left out of SPEC: 5 hidden (._b.txt, .cache, .hidden.txt, .ipynb_checkpoints and 1 more)",
    ]


def test_a_folder_that_is_hidden_itself_is_read(tmp_path: Path) -> None:
    make(tmp_path / ".data", "a.txt")
    assert found_in(str(tmp_path / ".data"), tmp_path) == ([".data/a.txt"], [])


def test_a_folder_of_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, "image.png", ".a.txt")
    with pytest.raises(
        CorpusError, match=r"no file to read: .*1 hidden \(\.a\.txt\); 1 with other endings \(image\.png\)"
    ):
        find_local(str(tmp_path))


@pytest.mark.parametrize("spec", ["", " ", "\n"])
def test_an_empty_name_is_not_this_folder(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match="a shell variable may be unset"):
        find_local(spec)
    assert find_local(".").paths == [Path("a.txt")]


@pytest.mark.parametrize("spec", ["/", "//", "/tmp/.."])
def test_the_whole_disk_is_refused(spec: str) -> None:
    with pytest.raises(CorpusError, match="is the whole disk"):
        find_local(spec)


def test_patterns_say_which_matches_they_do_not_open(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.md", "sub/c.txt")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    paths, notes = found_in(f"{tmp_path}/*", tmp_path)
    assert paths == ["a.txt", "b.md"]
    assert notes == [
        "left out of SPEC: 1 folders, which a pattern does not open (sub)",
        "left out of SPEC: 1 that lead nowhere or are no files (broken)",
    ]
    assert found_in(f"{tmp_path}/**/*.txt", tmp_path) == (["a.txt", "sub/c.txt"], [])


def test_saved_datasets_are_one_thing_to_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["one"]})
    saved.save_to_disk(tmp_path / "all" / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "all" / "two")
    make(tmp_path / "all", "a.txt")
    for name in ("all/one", "all/two", "all/two/test"):
        assert found_in(str(tmp_path / name), tmp_path) == ([name], [])
    assert found_in(str(tmp_path / "all"), tmp_path) == (["all/a.txt", "all/one", "all/two"], [])
    assert found_in(f"{tmp_path}/all/*", tmp_path)[0] == ["all/a.txt", "all/one", "all/two"]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt", "closed/b.txt")
    scan = os.scandir

    def scandir(path: str) -> object:  # permissions do not bind the superuser, whom tests may run as
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match=r"cannot be read as a whole .*closed' readable"):
        find_local(str(tmp_path))
