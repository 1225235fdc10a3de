"""Examples of a task from a local file or the hub, checked: texts, and labels as numbers (tags as they are).

A source is a path, or a dataset of the hub as `name:config:split`. Costs one pass over the records; nothing is
tokenised here. Every label that cannot be what the task means is refused with its file and line: a column that happens
to hold numbers would else train into a figure that means nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from student_train.evaluate.finetune.own_task import check_classes
from student_train.evaluate.finetune.task_files import TABLES, TAG, Record, read_records
from student_train.evaluate.finetune.tasks import Task
from teacher_cache.errors import TaskError, first_line
from teacher_cache.hub import HUB_ERRORS

_MOST_CLASSES = 1000
HUB_SOURCE = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]*)?(:[^:/]*)?")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples in order.

    `inputs` has one or two texts of each, for tokens its words; `labels` a class number, a score, or one tag for each
    word.
    """

    origin: str
    inputs: tuple[tuple[str, ...], ...]
    labels: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """What identifies the examples, wherever they came from."""
        digest = hashlib.sha256()
        for pair in zip(self.inputs, self.labels, strict=True):
            digest.update(json.dumps(pair).encode() + b"\n")
        return digest.hexdigest()

    def draw(self, count: int) -> Examples:
        """`count` of the examples at random, the same ones every time; all if there are no more."""
        if count >= len(self):
            return self
        chosen = sorted(random.Random(0).sample(range(len(self)), count))
        return Examples(
            origin=self.origin,
            inputs=tuple(self.inputs[index] for index in chosen),
            labels=tuple(self.labels[index] for index in chosen),
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read of a file or a dataset: `place` is how a record of it is named in messages."""

    name: str
    place: str
    records: list[Record]

    @property
    def languages(self) -> tuple[str, ...]:
        """The values of its column `language`; none without that."""
        return tuple(dict.fromkeys(str(record["language"]) for _, record in self.records if "language" in record))


def read_source(source: str, task: Task) -> Source:
    """All records of a source.

    Raises:
        TaskError: nothing can be read there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        place = f"{str(path)!r}, line"
        records = read_records(path, tokens=task.kind == "tokens", headless=task.headless)
    elif path.is_dir():
        raise TaskError(
            f"{str(path)!r} is a folder: which of its files holds the examples cannot be told; name the file, such as "
            f"{str(path / 'train.tsv')!r}"
        )
    elif _means_local(source):
        raise TaskError(
            f"there is no file {source!r}: there is nothing to read; check the path (relative ones start from "
            f"{str(Path.cwd())!r})"
        )
    else:
        place = f"dataset {source!r}, record"
        records = _read_hub(source)
    if not records:
        raise TaskError(f"{source!r} holds no examples: there is nothing to read; give a file with some")
    return Source(name=source, place=place, records=records)


def to_examples(source: Source, task: Task, language: str = "en") -> Examples:
    """The examples of a source; in a task of many languages, those in `language` if there are several.

    Raises:
        TaskError: columns are missing, or a label is none of the task's.
    """
    records = _in_language(source, language) if task.in_languages else source.records
    return _convert(records, task, source.name, source.place)


def check_examples(examples: Examples, task: Task, *, training: bool) -> None:
    """Refuse examples from which nothing can be learned, or on which the task's metric says nothing.

    Raises:
        TaskError: all have the same label, or no tag names an entity.
    """
    why = "nothing could be learned from them" if training else f"{task.metric} on them would say nothing"
    what = f"the {len(examples)} examples of {examples.origin!r}"
    more = "give more examples, or a file that was not sorted by label" + (" (or raise --train-rows)" * training)
    if task.kind == "tokens":
        if all(tag == "O" for tags in examples.labels for tag in tags):
            raise TaskError(f"{what} have no entity, every tag is 'O': {why}; {more}")
    elif len(set(examples.labels)) < 2:
        label = examples.labels[0]
        name = f"{label!r} ({task.labels[label]})" if task.labels else repr(label)
        raise TaskError(f"{what} all have the label {name}: {why}; {more}")


def _means_local(source: str) -> bool:
    suffix = Path(source.removesuffix(".gz")).suffix.lower()
    return (
        source.startswith(("/", ".", "~")) or suffix in (*TABLES, ".txt", ".conll") or not HUB_SOURCE.fullmatch(source)
    )


# ---- the hub --------------------------------------------------------------------------------------------------------


def _read_hub(source: str) -> list[Record]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, config, split = [*source.split(":", 2), "", ""][:3]
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train")
    except (*HUB_ERRORS, DatasetsError) as error:
        raise TaskError(
            f"{source!r} is no local file, and as a dataset of the hub (name:config:split) it cannot be read "
            f"({first_line(error)}): check the name and the network, or give --train-file and --dev-file (and "
            "--test-files) local files of the task"
        ) from error
    names = {column: _class_names(feature) for column, feature in records.features.items()}
    return [
        (number, {column: _named(value, names[column]) for column, value in record.items()})
        for number, record in enumerate(records, 1)
    ]


def _class_names(feature: Any) -> Sequence[str] | None:
    """Names of the classes that a column, or a list in it, holds as numbers."""
    feature = getattr(feature, "feature", feature)
    names: Sequence[str] | None = getattr(feature, "names", None)
    return names


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and value >= 0 else value


# ---- records -> examples --------------------------------------------------------------------------------------------


def _convert(records: Sequence[Record], task: Task, source: str, place: str) -> Examples:
    columns = _choose_columns(records[0][1], task, source)
    *input_columns, label_column = columns
    inputs: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for number, record in records:
        try:
            if task.kind == "tokens":
                words, tags = _tagged(record.get(input_columns[0]), record.get(label_column))
                inputs.append(words)
                labels.append(tags)
            else:
                inputs.append(tuple(_text(record.get(column), column) for column in input_columns))
                labels.append(_label(record.get(label_column), task))
        except ValueError as error:
            raise TaskError(f"{place} {number}: {error}") from error
    return Examples(origin=source, inputs=tuple(inputs), labels=tuple(labels))


def _in_language(source: Source, language: str) -> list[Record]:
    """The original XNLI files hold every language, one after the other."""
    held = source.languages
    if len(held) < 2:
        return source.records
    if language not in held:
        raise TaskError(
            f"{source.name!r} holds examples in several languages ({', '.join(held)}) and none in {language!r}: all of "
            "them together would be no language's score; name one with --language, and a set to test on after its "
            f"language, such as --test-files {held[0]}={source.name}"
        )
    return [(number, record) for number, record in source.records if record.get("language") == language]


def _choose_columns(record: Mapping[str, Any], task: Task, source: str) -> list[str]:
    chosen = []
    for accepted in (*task.inputs, task.label):
        found = [name for name in accepted if name in record]
        if not found:
            raise TaskError(
                f"{source!r} has the columns {', '.join(map(repr, record))}, and none of them is "
                f"{' or '.join(map(repr, accepted))}, which task {task.name!r} needs: give a file of this task, or "
                "rename the columns in its header"
            )
        chosen.append(found[0])
    return chosen


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {value!r} where a text is expected; mend or delete the example")
    return value


def _label(value: Any, task: Task) -> int | float:
    if value is None or value == "":
        raise ValueError("the label is missing: nothing can be learned or measured without; mend or delete the example")
    return _score(value, task) if task.kind == "regression" else _class_number(value, task)


def _class_number(value: Any, task: Task) -> int:
    text = _class_name(value)
    name = task.synonyms.get(text, text)
    if name in task.labels:
        return task.labels.index(name)
    # in a task of one's own, a number is a name like any other
    if not task.own and not isinstance(value, bool) and text.isdecimal() and int(text) < len(task.labels):
        return int(text)
    known = ", ".join(repr(name) if task.own else f"{number} or {name!r}" for number, name in enumerate(task.labels))
    withheld = "; -1 stands for a label that is withheld, as in GLUE's test sets" if text == "-1" else ""
    raise ValueError(
        f"label {value!r} is none of task {task.name!r} ({known}){withheld}; give a file of this task with its labels"
    )


def _class_name(value: Any) -> str:
    return str(value).strip().casefold().replace(" ", "_")


def with_classes(task: Task, source: Source) -> Task:
    """A task of the user's own with its classes, which are those of the examples where it names none.

    Raises:
        TaskError: the column of labels is missing, or holds more different values than classes could be.
        SettingsError: there are more classes than its metric is defined for.
    """
    if not task.own or task.kind != "classification":
        return task
    if task.labels:
        return replace(task, labels=tuple(map(_class_name, task.labels)))
    column = _choose_columns(source.records[0][1], task, source.name)[-1]
    found = {_class_name(value) for _, record in source.records if (value := record.get(column)) not in (None, "")}
    if len(found) > _MOST_CLASSES:
        raise TaskError(
            f"column {column!r} of {source.name!r} holds {len(found)} different values, which are no classes: give the "
            "column of the labels to --label-column, or --kind regression where they are scores"
        )
    labels = tuple(sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))
    check_classes(labels, task.metric)
    return replace(task, labels=labels)


def _score(value: Any, task: Task) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if task.own:
        if not math.isfinite(score):
            raise ValueError(f"label {value!r} is no number to learn; mend or delete the example")
    elif not 0 <= score <= 5:
        raise ValueError(f"label {value!r} is no similarity from 0 to 5; give a file of this task with its scores")
    return score


def _tagged(words: Any, tags: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for value, what in ((words, "words"), (tags, "tags")):
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{str(value)[:80]!r} is no list of {what}; give lists of strings, such as B-PER as a tag")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words and {len(tags)} tags: each word needs one; mend or delete the example")
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise ValueError(f"tag {tag!r} is not 'O' and none such as 'B-PER' or 'I-PER'; give tags in this form")
    return tuple(words), tuple(tags)
