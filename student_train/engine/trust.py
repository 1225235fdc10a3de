"""May a checkpoint be loaded? DeepSpeed unpickles its files, and what is unpickled can run code.

So nobody else may have written them: they belong to this user, or to root, and others have no right to write them.
And each of them names only what DeepSpeed and torch keep in checkpoints, which is looked at without unpickling it.
Cost: a look at each file, and the part of it that is not numbers.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import stat
from pathlib import Path

import torch

from teacher_cache.errors import TrainingError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_KNOWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
    }
)
"""What is in checkpoints beside what `torch.load(weights_only=True)` takes by itself; none of it runs anything."""


def check_trust(path: Path) -> None:
    """Check that nobody else could have made a checkpoint, and that nothing in it runs when it is loaded.

    Raises:
        TrainingError: somebody could, or something does.
    """
    for one in (path, *sorted(path.rglob("*"))):
        try:
            facts = one.stat()
        except OSError as error:
            raise _refused(one, f"cannot be looked at ({error.strerror})") from error
        if facts.st_uid not in (os.geteuid(), 0):
            raise _refused(one, f"belongs to user {facts.st_uid}, and you are user {os.geteuid()}")
        if facts.st_mode & _OTHERS_WRITE:
            raise _refused(one, f"may be written by others ({stat.filemode(facts.st_mode)})")
        if one.suffix == ".pt":
            _check_pickle(one)


def close_to_others(path: Path) -> None:
    """Take the right to write a checkpoint from all others: whoever has it could run code where it is loaded."""
    for one in (path, *path.rglob("*")):
        # file systems without such rights refuse, or do nothing: whoever resumes there is asked
        with contextlib.suppress(OSError):
            mode = one.stat().st_mode
            if mode & _OTHERS_WRITE:
                one.chmod(stat.S_IMODE(mode) & ~_OTHERS_WRITE)


def _check_pickle(file: Path) -> None:
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _KNOWN
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _refused(file, f"is not what DeepSpeed writes ({error})") from error
    if names:
        raise _refused(file, f"names {', '.join(sorted(names))}, which no checkpoint of kdtrain needs")


def _refused(path: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{str(path)!r} {what}: loading a checkpoint can run whatever code is in it, so it was not loaded; if you know "
        "who wrote it, give --trust-checkpoint, or make the folder yours alone (chown, chmod -R go-w)"
    )
