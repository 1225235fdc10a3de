"""A causal student on tasks of lm-evaluation-harness: `kdeval lm-eval`.

In: a student's folder and names of tasks. Out: an `LmEvalReport`. The student is loaded by us and handed over with its
tokenizer; prompts, examples, answers and metrics are the harness's, with its seeds, so that numbers are those that
others get from it. Tasks come from a folder of the user's, whose data may lie beside them, or from the harness, whose
data come from the hub. The harness is imported when it is needed: three seconds, and twenty more to list its own tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from student_train.evaluate.causal import CausalModel, load_causal
from student_train.evaluate.lm_eval.records import LmEvalReport, Metric, TaskResult
from student_train.evaluate.lm_eval.settings import LmEvalSettings
from teacher_cache.device import resolve_dtype
from teacher_cache.errors import SettingsError, TaskError, first_line
from teacher_cache.models.arithmetic import move_model
from teacher_cache.wording import some

INSTALL = "pip install 'kdcache[lm-eval]'"
INSTEAD = "the harness asks for such; measure an encoder with `kdeval finetune`"
BOOTSTRAP = 1000
"""Resamplings for the standard error of metrics that are no means."""
_WITHOUT_FILTER = "none"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Show(Protocol):
    """Called with what is being done, for a progress line."""

    def __call__(self, doing: str, /) -> None: ...


def measure_lm_eval(settings: LmEvalSettings, *, device: str, show: Show) -> LmEvalReport:
    """Measure the student on the tasks, on a device (`cpu`, `cuda`).

    Raises:
        SettingsError: the harness is not installed.
        StudentError: the student cannot be loaded or is no causal LM.
        TaskError: there is no such task, or it or its data cannot be read.
    """
    require_harness()
    show("loading the student")
    student = load_causal(settings.student, "student", instead=INSTEAD, tokenizer=True)
    dtype = resolve_dtype(settings.dtype, torch.device(device))
    move_model(student.model, device=device, dtype=getattr(torch, dtype))
    names = settings.chosen_tasks()
    show("looking for the tasks")
    with _quiet():
        manager = _find(names, settings.include_path)
        show(f"measuring {', '.join(names)}")
        found = _evaluate(student, manager, settings)
    results = tuple(_results(found, names))
    notes = []
    if settings.limit is not None:
        notes.append(f"on the first {settings.limit} questions of each task alone: such scores are for trying out")
    return LmEvalReport(
        student=settings.student,
        results=results,
        limit=settings.limit,
        dtype=dtype,
        device=device,
        harness=metadata.version("lm_eval"),
        fingerprints={"student": student.fingerprint},
        notes=tuple(notes),
    )


def require_harness() -> None:
    """Raises SettingsError where the harness cannot be imported."""
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"lm-evaluation-harness cannot be imported ({first_line(error)}): `kdeval lm-eval` hands the student to "
            f"it; install it with {INSTALL}"
        ) from error


def _find(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks that has all the names, that of the folder alone if that does."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else Path(include_path).expanduser()
    managers = (TaskManager(include_path=folder, include_defaults=whole) for whole in (False, True) if whole or folder)
    missing: list[str] = []
    for manager in _reading(managers, include_path):
        known = set(manager.all_tasks)
        missing = [name for name in names if name not in known]
        if not missing:
            return manager
    where = "" if include_path is None else f"neither in --include-path {include_path!r} nor "
    raise TaskError(
        f"lm-evaluation-harness has no task {some(missing)}, {where}among its own: nothing can be measured; check the "
        "names (`task:` and `group:` in task files, `lm-eval ls tasks` for the others)"
    )


def _reading(managers: Iterator[Any], include_path: str | None) -> Iterator[Any]:
    try:
        yield from managers
    except Exception as error:
        # task files are anybody's, and are stumbled over in many ways
        raise TaskError(
            f"the task files in {include_path!r} cannot be read ({type(error).__name__}: {first_line(error)}): mend "
            "them, or give another --include-path"
        ) from error


def _evaluate(student: CausalModel, manager: Any, settings: LmEvalSettings) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=student.model,
        tokenizer=student.tokenizer(),
        backend="causal",
        batch_size=settings.batch_size,
        max_length=student.positions,
    )
    try:
        found: Mapping[str, Any] | None = simple_evaluate(
            model=model,
            tasks=list(settings.chosen_tasks()),
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    except RuntimeError:
        # of PyTorch: memory, a device
        raise
    except Exception as error:
        raise TaskError(
            f"lm-evaluation-harness cannot run {', '.join(settings.chosen_tasks())} ({type(error).__name__}: "
            f"{first_line(error)}): a task, its data or what it asks of the tokenizer is not as it needs it; paths in "
            "task files start from the folder where the command is typed, and data of its own tasks come from the hub"
        ) from error
    if not found or not found.get("results"):
        raise TaskError(
            f"lm-evaluation-harness gave no results of {', '.join(settings.chosen_tasks())}: nothing was measured; "
            "check that the tasks have a test or validation split"
        )
    return found


def _results(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[TaskResult]:
    """The tasks that were named, each followed by those that it brought."""
    groups: Mapping[str, Sequence[str]] = found.get("group_subtasks") or {}
    owners = {inner: group for group, tasks in groups.items() for inner in tasks}
    order = {name: (names.index(_root(name, owners, names)), name not in names) for name in found["results"]}
    for name in sorted(found["results"], key=order.__getitem__):
        metrics = dict(_metrics(name, found))
        if metrics:
            config = (found.get("configs") or {}).get(name)
            version = (found.get("versions") or {}).get(name)
            yield TaskResult(
                task=name,
                metrics=metrics,
                group=None if name in names else owners.get(name),
                version=None if version is None else str(version),
                shots=None if config is None else (found.get("n-shot") or {}).get(name),
                examples=((found.get("n-samples") or {}).get(name) or {}).get("effective"),
                config_sha256=None if config is None else _fingerprint(config),
            )


def _root(name: str, owners: Mapping[str, str], names: Sequence[str]) -> str:
    """The named task that brought this one."""
    while name not in names and name in owners:
        name = owners[name]
    return name if name in names else names[-1]


def _metrics(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    entries: Mapping[str, Any] = found["results"][name]
    better = (found.get("higher_is_better") or {}).get(name) or {}
    for key, value in entries.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        stderr = entries.get(f"{metric}_stderr,{filtered}")
        yield (
            metric if filtered == _WITHOUT_FILTER else key,
            Metric(value=float(value), stderr=_known(stderr), higher_is_better=better.get(metric)),
        )


def _known(value: object) -> float | None:
    """A number, or None for what the harness calls N/A."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _fingerprint(config: object) -> str:
    """SHA-256 of a task as the harness understood its file; functions of it count by their names."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(_ADDRESS.sub("", text).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is for our result alone, and what the harness warns of is what it is given on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
