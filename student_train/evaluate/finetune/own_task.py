"""A task of the user's own, from the flags that describe it. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from student_train.evaluate.finetune.tasks import METRICS, TASKS, Kind, Task
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
"""What can stand in the name of a record's file."""


def own_task(name: str, flags: Mapping[str, Any]) -> Task:
    """The task called `name`; `flags` are columns, label-column, labels, kind and metric, None where not given.

    Raises:
        SettingsError: something is missing, or does not go together.
    """
    columns, label = _split(flags["columns"]), flags["label-column"]
    if not columns or not label:
        lacking = "--columns" if not columns else "--label-column"
        raise SettingsError(
            f"--task {name!r} is none that is known here, and as a task of your own it lacks {lacking}: which columns "
            f"of the files hold text and label cannot be told; give --columns and --label-column, or "
            f"{did_you_mean(name, TASKS)} one of {', '.join(TASKS)}"
        )
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"--task {name!r} cannot name a task: a record is kept under this name; give letters, digits, '-', '_' and "
            "'.', at most 64"
        )
    kind = _kind(flags["kind"], flags["metric"])
    metric = flags["metric"] or METRICS[kind][0]
    if metric not in METRICS[kind]:
        raise SettingsError(
            f"--metric {metric!r} says nothing of --kind {kind!r}: give {' or '.join(METRICS[kind])}, or another --kind"
        )
    if len(columns) > (1 if kind == "tokens" else 2):
        raise SettingsError(
            f"--columns {flags['columns']!r} names {len(columns)} columns: a model reads one text or two, and where "
            "tokens are tagged one list of words; give as many"
        )
    return Task(
        name=name,
        kind=kind,
        inputs=tuple((column,) for column in columns),
        label=(label,),
        labels=_labels(flags["labels"], kind, metric),
        metric=metric,
        own=True,
    )


def _kind(kind: Kind | None, metric: str | None) -> Kind:
    if kind is not None:
        return kind
    return "regression" if metric in METRICS["regression"] else "classification"


def _labels(given: str | None, kind: Kind, metric: str) -> tuple[str, ...]:
    if given is None:
        return ()
    labels = _split(given)
    if kind != "classification" or len(labels) < 2 or len(set(labels)) < len(labels):
        raise SettingsError(
            f"--labels {given!r} cannot be the classes of a task of --kind {kind!r}: give two different ones or more to"
            " a classification, and none to others"
        )
    check_classes(labels, metric)
    return labels


def check_classes(labels: tuple[str, ...], metric: str) -> None:
    """Refuse more classes than the metric is defined for.

    Raises:
        SettingsError: there are more.
    """
    if metric in ("f1", "matthews") and len(labels) > 2:
        raise SettingsError(
            f"--metric {metric!r} is of two classes, and the task has {len(labels)} ({', '.join(labels[:6])}): give "
            "--metric accuracy or macro-f1"
        )


def _split(value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())
