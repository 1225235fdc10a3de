"""The examples of one fine-tuning: which sources the settings name, read once each and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from student_train.evaluate.finetune.examples import (
    Examples,
    Source,
    check_examples,
    read_source,
    to_examples,
    with_classes,
)
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.finetune.tag_schemes import check_tags, find_scheme
from student_train.evaluate.finetune.tasks import Task, hub_sources
from teacher_cache.errors import SettingsError, TaskError


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Examples to train on, and those to measure on by name, `dev` first; for tokens, the scheme of their tags."""

    task: Task
    train: Examples
    measured: Mapping[str, Examples]
    scheme: str | None = None

    def all(self) -> dict[str, Examples]:
        """Every set of examples by name, `train` first."""
        return {"train": self.train, **self.measured}

    def sources(self) -> dict[str, str]:
        """Where each set was read from."""
        return {name: examples.origin for name, examples in self.all().items()}

    def labels(self) -> tuple[str, ...]:
        """The classes by number, the tags for token classification, nothing for a regression."""
        if self.task.kind != "tokens":
            return self.task.labels
        return tuple(sorted({tag for each in self.all().values() for tags in each.labels for tag in tags}))

    def unlearnable(self) -> list[str]:
        """Entities to be found that training has no example of."""
        if self.task.kind != "tokens":
            return []
        return sorted(set().union(*map(_entities, self.measured.values())) - _entities(self.train))


def read_data(settings: FinetuneSettings) -> TaskData:
    """Read all that the settings name.

    Raises:
        TaskError: a source cannot be read, is none of the task, or says nothing about it.
        SettingsError: a language was asked for and no file tells any, or a metric that the classes do not have.
    """
    task = settings.chosen_task()
    train, dev, tests = hub_sources(task, settings.language, settings.chosen_test_languages())
    if settings.train_file is not None and settings.dev_file is not None:
        train, dev, tests = settings.train_file, settings.dev_file, {}
    # each once: several sets may be of one file
    read = cache(lambda source: read_source(source, task))
    task = with_classes(task, read(train))
    if settings.language != "en" and settings.train_file is not None:
        _check_chosen(settings.language, read(train), read(dev))
    training = to_examples(read(train), task, settings.language)
    training = training if settings.train_rows is None else training.draw(settings.train_rows)
    check_examples(training, task, training=True)
    measured = {"dev": to_examples(read(dev), task, settings.language)}
    for name, source in (settings.named_test_files() or tests).items():
        measured[name] = to_examples(read(source), task, name)
    for examples in measured.values():
        check_examples(examples, task, training=False)
    data = TaskData(task=task, train=training, measured=measured)
    if task.kind == "tokens":
        _check_entities(data)
        data = replace(data, scheme=_scheme(data))
    return data


def _check_chosen(language: str, train: Source, dev: Source) -> None:
    if not train.languages and not dev.languages:
        raise SettingsError(
            f"--language {language!r} chooses by a column 'language', which neither {train.name!r} nor {dev.name!r} "
            "has: nothing would be chosen; leave it out"
        )


def _check_entities(data: TaskData) -> None:
    known = _entities(data.train)
    for examples in data.measured.values():
        if not known & _entities(examples):
            raise TaskError(
                f"the entities of {examples.origin!r} ({', '.join(sorted(_entities(examples)))}) have other names than "
                f"those to train on in {data.train.origin!r} ({', '.join(sorted(known))}): every score would be 0; "
                "give files with the same tags"
            )


def _scheme(data: TaskData) -> str:
    """The one scheme of all tags: a model that learned another one than it is measured in would score anything."""
    sets = data.all().values()
    scheme = find_scheme(data.labels(), ", ".join(dict.fromkeys(repr(each.origin) for each in sets)))
    for examples in sets:
        for words, tags in zip(examples.inputs, examples.labels, strict=True):
            check_tags(words, tags, scheme, examples.origin)
    return scheme


def _entities(examples: Examples) -> set[str]:
    return {tag.partition("-")[2] for tags in examples.labels for tag in tags if tag != "O"}
