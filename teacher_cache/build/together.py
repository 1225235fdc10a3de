"""Several processes that hold one teacher and do the work of one: the first does it, the others run their shares.

Not to be confused with the workers of `workers.py`, of which each has a teacher of its own and takes some blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from teacher_cache.build.inputs import load_teacher
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.workers import Workers
from teacher_cache.teacher.processes import Processes
from teacher_cache.teacher.shared import SharedTeacher

_Result = TypeVar("_Result")


def work_together(settings: BuildSettings, workers: Workers, lead: Callable[[Processes], _Result]) -> _Result:
    """What `lead` comes to in the first of the processes that a launcher started; all of them return it.

    Raises:
        SettingsError: there is one process only, or not a device for each.
        DistillationError: what `lead` raises, and in the other processes that it did.
    """
    processes = Processes.join(workers.rank, workers.count, workers.meeting, settings.device)
    if not processes.leads:
        return cast("_Result", cast("SharedTeacher", load_teacher(settings, processes)).follow())
    with processes.leading():
        result = lead(processes)
        processes.end(result)
    return result
