"""The sets of one fine-tuning: which files they are of, and what must go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.finetune import data as module
from student_train.evaluate.finetune.data import TaskData, read_data
from student_train.evaluate.finetune.settings import FinetuneSettings
from teacher_cache.errors import SettingsError, TaskError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files to train and to measure on of sst2."""
    found = {}
    for name, count in (("train", 6), ("dev", 4)):
        path = tmp_path / f"{name}.tsv"
        lines = [f"{name} {number}\t{number % 2}" for number in range(count)]
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        found[f"{name}_file"] = str(path)
    return found


def read(task: str = "sst2", **options: Any) -> TaskData:
    return read_data(FinetuneSettings(task=task, **options))  # type: ignore[arg-type]


def first_texts(data: TaskData) -> dict[str, str]:
    return {name: examples.inputs[0][0] for name, examples in data.all().items()}


def test_sets_by_name(files: dict[str, str]) -> None:
    data = read(**files, test_files=(f"x={files['dev_file']}", f"y={files['train_file']}"))
    assert first_texts(data) == {"train": "train 0", "dev": "dev 0", "x": "dev 0", "y": "train 0"}
    assert list(data.measured) == ["dev", "x", "y"]
    assert data.labels() == ("negative", "positive") and data.unlearnable() == []


def test_each_file_is_read_once(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """XNLI's file of all languages is many sets."""
    names: list[str] = []
    real = module.read_source

    def count(source: str, task: Any) -> Any:
        names.append(source)
        return real(source, task)

    monkeypatch.setattr(module, "read_source", count)
    read(**files, test_files=(f"x={files['dev_file']}", f"y={files['train_file']}"))
    assert sorted(names) == sorted(files.values())


def test_training_rows_are_drawn_and_measured_ones_are_not(files: dict[str, str]) -> None:
    data = read(**files, train_rows=5)
    assert (len(data.train), len(data.measured["dev"])) == (5, 4)
    assert data.train.sha256() == read(**files, train_rows=5).train.sha256()


def test_sets_that_say_nothing_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("sentence\tlabel\nx\t1\ny\t1\n")
    one = str(tmp_path / "one.tsv")
    for options, said in (
        ({"train_file": one}, "nothing could be learned"),
        ({"dev_file": one}, "accuracy on them would say nothing"),
        ({"test_files": (f"x={one}",)}, "accuracy on them would say nothing"),
    ):
        with pytest.raises(TaskError, match=f"one.tsv' all have the label 1.*{said}"):
            read(**{**files, **options})


def test_of_a_file_in_several_languages_one_is_read(tmp_path: Path) -> None:
    """As the original XNLI files come: one after the other, told by a column."""
    lines = ["language\tgold_label\tsentence1\tsentence2"]
    lines += [
        f"{language}\t{label}\t{language} {number}\tx"
        for label in ("neutral", "entailment")
        for language in ("ar", "en")
        for number in range(2)
    ]
    whole, plain = tmp_path / "xnli.test.tsv", tmp_path / "plain.tsv"
    whole.write_text("\n".join(lines))
    plain.write_text("\n".join(line.partition("\t")[2] for line in lines))
    with pytest.raises(SettingsError, match="--language 'ar' chooses by a column 'language'"):
        read("xnli", language="ar", train_file=str(plain), dev_file=str(plain))
    tests = tuple(f"{language}={whole}" for language in ("en", "ar"))
    data = read("xnli", language="ar", train_file=str(whole), dev_file=str(whole), test_files=tests)
    assert first_texts(data) == {"train": "ar 0", "dev": "ar 0", "en": "en 0", "ar": "ar 0"}


def test_tags(tmp_path: Path) -> None:
    train, dev = tmp_path / "train.txt", tmp_path / "dev.txt"
    train.write_text("Angela\tB-PER\nMerkel\tI-PER\nlacht\tO\n")
    dev.write_text("Rom\tB-LOC\nPeter\tB-PER\n")
    data = read("ner", train_file=str(train), dev_file=str(dev))
    # one number each, whichever set has them
    assert data.labels() == ("B-LOC", "B-PER", "I-PER", "O")
    assert data.unlearnable() == ["LOC"]
    dev.write_text("Peter\tB-person\n")
    with pytest.raises(TaskError, match=r"dev.txt' \(person\) have other names than .*train.txt' \(PER\)"):
        read("ner", train_file=str(train), dev_file=str(dev))


def test_all_tags_are_in_one_scheme(tmp_path: Path) -> None:
    train, dev = tmp_path / "train.txt", tmp_path / "dev.txt"

    def scheme(train_tags: str, dev_tags: str) -> str | None:
        for path, tags in ((train, train_tags), (dev, dev_tags)):
            path.write_text("".join(f"w{number}\t{tag}\n" for number, tag in enumerate(tags.split())))
        return read("ner", train_file=str(train), dev_file=str(dev)).scheme

    assert scheme("B-PER I-PER O", "I-PER O") == "IOB"
    assert scheme("I-PER E-PER O", "E-PER O") == "IOE"
    assert scheme("B-PER L-PER O", "U-PER O") == "BILOU"
    assert scheme("B-PER M-PER E-PER O", "S-PER O") == "BMES"
    with pytest.raises(TaskError, match=r"train.txt', '.*dev.txt' begin with 'B', 'L', 'S', which no scheme"):
        scheme("B-PER L-PER O", "S-PER O")
    # one file in IOB2 beside one in BILOU
    with pytest.raises(
        TaskError, match=r"dev.txt' holds 'w0 w1', tagged 'B-PER O': 'O' cannot follow 'B-PER' in BILOU"
    ):
        scheme("B-PER L-PER O U-PER", "B-PER O")


def test_without_files_it_is_the_dataset_of_the_hub() -> None:
    with pytest.raises(TaskError, match="'nyu-mll/glue:sst2:train' is no local file"):
        read()
