"""Where a run starts: afresh, or from which checkpoint. What would be overwritten is refused.

In: the settings and what lies in OUT. Nothing is changed there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from student_train.engine.checkpoint import FOLDER_NAME, check_checkpoint, newest_checkpoint
from student_train.engine.trust import check_trust
from student_train.out_folder import RUN_LOCK, refuse_file
from student_train.run_files import METRICS_NAME
from student_train.settings import TrainSettings
from student_train.students.export import UNFINISHED
from teacher_cache.errors import TrainingError
from teacher_cache.wording import some

_OURS = (RUN_LOCK, UNFINISHED)
"""What a killed run may leave behind, and nobody misses."""


def find_start(settings: TrainSettings, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The checkpoint to go on from, or None to start afresh; `say` is told of damaged ones that are passed over.

    Raises:
        TrainingError: OUT holds something that would be overwritten, there is no such checkpoint, or others may have
            written it.
    """
    out = Path(settings.out)
    refuse_file(out)
    found = sorted(path.name for path in out.iterdir() if path.name not in _OURS) if out.exists() else []
    ours = METRICS_NAME in found or FOLDER_NAME in found
    if found and (settings.resume == "never" or not ours):
        advice = "give --resume auto to go on with that run, or choose" if ours else "choose"
        raise TrainingError(
            f"--out {settings.out!r} already holds {some(list(map(repr, found)))}: training would overwrite it; "
            f"{advice} another --out"
        )
    if settings.resume in ("never", "auto"):
        newest = newest_checkpoint(out, say)
        if newest is not None and not settings.trust_checkpoint:
            check_trust(newest)
        return newest
    path = Path(settings.resume)
    check_checkpoint(path)
    if found and path.resolve().parent != (out / FOLDER_NAME).resolve():
        raise TrainingError(
            f"--resume {settings.resume!r} is a checkpoint of another run, and --out {settings.out!r} already holds "
            f"{some(list(map(repr, found)))}: they would be overwritten and mixed; choose another --out"
        )
    if not settings.trust_checkpoint:
        check_trust(path)
    return path
