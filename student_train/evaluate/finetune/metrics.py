"""The metrics of a task, from predictions and labels, by the libraries that the field takes them from.

Classes and scores through scikit-learn and scipy, entities through seqeval in the scheme of their tags. Costs seconds
at most.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from student_train.evaluate.finetune.tag_schemes import score_entities
from student_train.evaluate.finetune.tasks import Task
from teacher_cache.errors import SettingsError

NEEDED = {"accelerate": "accelerate", "scipy": "scipy", "sklearn": "scikit-learn", "seqeval": "seqeval"}


def require_libraries() -> None:
    """Refuse to start where a library is missing that would be needed at the end.

    Raises:
        SettingsError: one is not installed.
    """
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise SettingsError(f"kdeval finetune needs {package}, which is not installed: pip install 'kdcache[eval]'")


def measure(task: Task, predictions: Sequence[Any], labels: Sequence[Any], scheme: str = "IOB") -> dict[str, float]:
    """Every metric of the task by name; `task.metric` is the one that counts. Tags are in `scheme`.

    A correlation with predictions that are all the same is not defined; it is given as 0, like any other prediction
    that carries no information.
    """
    if task.kind == "tokens":
        return score_entities(predictions, labels, scheme)
    if task.kind == "regression":
        return _correlations(np.asarray(predictions, np.float64), np.asarray(labels, np.float64))
    return _classes(task, predictions, labels)


def _classes(task: Task, predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    found = {"accuracy": float(accuracy_score(labels, predictions))}
    if len(task.labels) == 2:
        found["f1"] = float(f1_score(labels, predictions, zero_division=0))
        found["matthews"] = float(matthews_corrcoef(labels, predictions))
    if task.metric == "macro-f1":
        found["macro-f1"] = float(f1_score(labels, predictions, average="macro", zero_division=0))
    return found


def _correlations(predictions: Any, labels: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, which is what the 0 stands for
        found = {"spearman": spearmanr(predictions, labels)[0], "pearson": pearsonr(predictions, labels)[0]}
    return {name: 0.0 if math.isnan(value) else float(value) for name, value in found.items()}
