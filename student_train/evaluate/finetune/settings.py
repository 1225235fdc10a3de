"""The flags of `kdeval finetune`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from student_train.evaluate.finetune.own_task import own_task
from student_train.evaluate.finetune.tasks import TASKS, Kind, Task
from teacher_cache.errors import SettingsError

TaskName = Literal["sst2", "rte", "mrpc", "cola", "stsb", "qnli", "qqp", "mnli", "xnli", "ner"]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Fine-tune a student on a task and measure it there, with several seeds.

    Any Hugging Face encoder will do: the teacher, or somebody else's student. The trained models are not kept, but for
    the one that --save asks for. A task of your own is any other name, files, their columns and a metric.
    Training is AdamW with weight decay 0.01, warm-up over the first tenth of the steps and linear decay to 0; the
    weights after the last step are measured, with the task's own metric (GLUE: accuracy, F1 of MRPC and QQP, Matthews
    correlation of CoLA, Spearman correlation of STS-B; ner: F1 of entities). Results are kept, so that a second run
    answers at once and an interrupted one goes on at the next seed.
    """

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face encoder."""

    task: TaskName | str
    """GLUE tasks, xnli (trained on one language, tested on many), ner (token classification), or a name of your own,
    with --columns and --label-column."""

    columns: str | None = None
    """Of your own task: the column of the text, or two joined by a comma, such as premise,hypothesis; of tokens, that
    of the words."""

    label_column: str | None = None
    """Of your own task: the column of the label, score or tags."""

    labels: str | None = None
    """Of your own task: its classes in order, such as no,yes (default: those in the files, by number or alphabet)."""

    kind: Kind | None = None
    """Of your own task (default: what its metric is for, classification without one)."""

    metric: Literal["accuracy", "f1", "macro-f1", "matthews", "spearman", "pearson"] | None = None
    """Of your own task: what counts (default: accuracy; spearman of a regression; f1 of entities where tokens are
    tagged). f1 is that of the second class."""

    train_file: str | None = None
    """Examples to train on: .tsv or .csv with a header, .jsonl (each also .gz), for ner also CoNLL columns; or a
    dataset of the hub as name:config:split (default: the task's dataset on the hub)."""

    dev_file: str | None = None
    """Examples to measure on, and to choose the learning rate on if there are several. Goes with --train-file."""

    test_files: tuple[str, ...] = ()
    """More sets to measure on, as name=FILE, such as de=xnli.de.tsv; the score is then the mean over these sets. Of a
    file with a column `language`, as the original XNLI files have, the set is the language that it is named after."""

    language: str = "en"
    """Of xnli and ner from the hub, or in files with a column `language`, the language to train on."""

    test_languages: str | None = None
    """Of xnli and ner from the hub, languages to test on, such as en,de,sw (default: for xnli all 15, for ner the
    language of --language)."""

    seeds: int = 3
    """Repeat with so many seeds (0, 1, ...), which draw the new head, the order of the examples and dropout."""

    lr: str = "5e-5"
    """Peak learning rate, or several such as 3e-5,1e-4: then every seed is trained with each, and the one that is best
    on --dev-file counts."""

    epochs: float = 3.0
    """Passes over the examples to train on."""

    batch_size: int = 32
    """Examples per update."""

    max_length: int = 128
    """Cut examples after so many tokens."""

    train_rows: int | None = None
    """Train on so many examples, drawn at random once, the same for all seeds and students (default: all)."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass: bfloat16 is for GPUs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    cache_dir: str | None = None
    """Keep the results here (default: .finetune-cache in the student's directory)."""

    save: str | None = None
    """New folder for the fine-tuned model: of the seed, and of several --lr the one, that is best on --dev-file. It can
    be exported, timed and used like any other."""

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        for flag, value in (("seeds", self.seeds), ("batch-size", self.batch_size), ("train-rows", self.train_rows)):
            if value is not None and value < 1:
                raise SettingsError(f"--{flag} {value!r} leaves nothing to train: give 1 or more")
        if self.max_length < 8:
            raise SettingsError(f"--max-length {self.max_length!r} leaves next to nothing of a text: give 8 or more")
        if not 0 < self.epochs < math.inf:
            raise SettingsError(f"--epochs {self.epochs!r} is no number of passes: give a positive one")
        if (self.train_file is None) != (self.dev_file is None):
            given, lacking = ("train", "dev") if self.dev_file is None else ("dev", "train")
            raise SettingsError(
                f"--{given}-file is given without --{lacking}-file: examples to train and to measure on must be of one "
                f"dataset to mean anything; give --{lacking}-file too, or neither of them for the task's dataset on "
                "the hub"
            )
        if self.chosen_task().own and self.train_file is None:
            raise SettingsError(
                f"--task {self.task!r} is a task of your own, which has no dataset on the hub: give --train-file and "
                "--dev-file"
            )
        self._check_languages()
        self.learning_rates()
        self.named_test_files()

    def _check_languages(self) -> None:
        given = [f"--language {self.language}"] if self.language != "en" else []
        given += [f"--test-languages {self.test_languages}"] if self.test_languages is not None else []
        if given and not self.chosen_task().in_languages:
            raise SettingsError(f"{given[0]!r} is for xnli and ner, and --task is {self.task!r}: leave it out")
        if self.test_languages is not None and self.train_file is not None:
            raise SettingsError(
                f"{given[-1]!r} chooses parts of the dataset on the hub, which this run does not read: leave it out, "
                "and name local files of other languages by --test-files de=FILE"
            )
        if self.test_languages is not None and (self.test_files or not self.chosen_test_languages()):
            raise SettingsError(
                f"--test-languages {self.test_languages!r} cannot be used: give languages such as en,de, and no "
                "--test-files beside them"
            )

    def chosen_task(self) -> Task:
        """The task; the classes of one of the user's own may not be known yet."""
        own = {
            "columns": self.columns,
            "label-column": self.label_column,
            "labels": self.labels,
            "kind": self.kind,
            "metric": self.metric,
        }
        if self.task not in TASKS:
            return own_task(self.task, own)
        given = next((f"--{flag} {value!r}" for flag, value in own.items() if value is not None), None)
        if given is not None:
            raise SettingsError(
                f"{given} is for tasks of your own, and --task {self.task!r} is known here with its columns and metric:"
                " leave it out, or give your task a name of its own"
            )
        return TASKS[self.task]

    def saved_to(self) -> Path | None:
        """The folder of --save."""
        return None if self.save is None else Path(self.save).expanduser()

    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates to try, in the order given."""
        try:
            rates = tuple(float(part) for part in self.lr.split(","))
        except ValueError:
            rates = ()
        if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise SettingsError(
                f"--lr {self.lr!r} cannot be used: give a positive number, or different ones joined by commas such as "
                "3e-5,1e-4"
            )
        return rates

    def named_test_files(self) -> dict[str, str]:
        """The files of `test_files` by name."""
        pairs = [entry.partition("=") for entry in self.test_files]
        for entry, (name, _, file) in zip(self.test_files, pairs, strict=True):
            if not name or not file:
                raise SettingsError(f"--test-files {entry!r} has no name: give name=FILE, such as de=xnli.de.tsv")
        _check_names([name for name, _, _ in pairs])
        return {name: file for name, _, file in pairs}

    def chosen_test_languages(self) -> tuple[str, ...] | None:
        """The languages of `test_languages`, None if none were chosen."""
        if self.test_languages is None:
            return None
        return tuple(dict.fromkeys(part.strip() for part in self.test_languages.split(",") if part.strip()))


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1 or name in ("train", "dev"):
            raise SettingsError(
                f"--test-files names a set {name!r}, as another set is named: give each a name of its own, other than "
                "train and dev"
            )
