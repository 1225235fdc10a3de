"""Tasks of the user's own: what flags make of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.evaluate.finetune.own_task import own_task
from student_train.evaluate.finetune.settings import FinetuneSettings
from teacher_cache.errors import SettingsError

FILES = {"train_file": "train.tsv", "dev_file": "dev.tsv"}


def make(**flags: Any):
    given = {"columns": "text", "label-column": "stars", "labels": None, "kind": None, "metric": None}
    return own_task("reviews", {**given, **{name.replace("_", "-"): value for name, value in flags.items()}})


def test_what_flags_make() -> None:
    task = make(columns="premise, hypothesis", labels="no,yes", metric="f1")
    assert (task.inputs, task.label, task.labels) == ((("premise",), ("hypothesis",)), ("stars",), ("no", "yes"))
    assert (task.kind, task.metric, task.own, task.in_languages) == ("classification", "f1", True, False)
    assert (make().metric, make(metric="pearson").kind, make(kind="regression").metric) == (
        "accuracy", "regression", "spearman",
    )  # fmt: skip
    assert make(kind="tokens", columns="words").metric == "f1"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"columns": None}, "lacks --columns"),
        ({"label_column": None}, "lacks --label-column"),
        ({"columns": "a,b,c"}, "names 3 columns"),
        ({"columns": "a,b", "kind": "tokens"}, "names 2 columns"),
        ({"kind": "regression", "metric": "f1"}, "--metric 'f1' says nothing of --kind 'regression'"),
        ({"labels": "yes"}, "--labels 'yes'"),
        ({"labels": "a,b", "kind": "regression"}, "--labels 'a,b'"),
        ({"labels": "a,b,c", "metric": "f1"}, "of two classes, and the task has 3"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make(**flags)


def test_names_and_files() -> None:
    with pytest.raises(SettingsError, match="did you mean sst2"):
        FinetuneSettings(task="sst", **FILES)
    with pytest.raises(SettingsError, match=r"'\.\./x' cannot name a task"):
        FinetuneSettings(task="../x", columns="a", label_column="b", **FILES)
    with pytest.raises(SettingsError, match="no dataset on the hub"):
        FinetuneSettings(task="mine", columns="a", label_column="b")
    with pytest.raises(SettingsError, match="--metric 'f1' is for tasks of your own"):
        FinetuneSettings(task="sst2", metric="f1")
