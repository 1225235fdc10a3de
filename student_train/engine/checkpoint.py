"""Checkpoints that are either whole or not there: written by the engine, sealed by a marker of our own.

`OUT/checkpoints/step-00000500/` holds what DeepSpeed saves (weights, optimizer, schedule) with the state it does not
keep: random generators, position in the data, best validation. `complete.json` beside them lists every file with its
size and SHA-256 and is renamed into place after all of them have reached the disk; DeepSpeed's own `latest` file is
written in place and is not used. A folder whose marker is missing or does not match is never loaded. The newest `KEPT`
checkpoints stay; a run that goes on from an earlier step deletes those of later ones. Cost: the files are read once
more to hash them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field

from student_train.engine.ranks import Ranks
from student_train.engine.trust import close_to_others
from student_train.out_folder import delete_marked, explain_write_errors
from teacher_cache.disk import flush_to_disk
from teacher_cache.errors import DistillationError, TrainingError
from teacher_cache.fields import Count, Sha256, StrictFields, check_fields
from teacher_cache.outside import parse_json

FOLDER_NAME = "checkpoints"
MARKER_NAME = "complete.json"
KEPT = 2
_LONGEST_NAME = 255
"""Letters of a file's name that file systems take."""

RandomState = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What `complete.json` says: the step, by how many processes, what a run must share to go on, and every file.

    `files` are [bytes, SHA-256] by name.
    """

    step: int
    processes: int
    identity: Mapping[str, Any]
    files: Mapping[str, list[Any]]


def _inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or max(map(len, parts)) > _LONGEST_NAME:
        raise ValueError("it must be the name of a file in the checkpoint")
    return name


class MarkerSchema(StrictFields):
    """`Marker`."""

    step: Count
    processes: Annotated[int, Field(ge=1, le=2**20)]
    identity: dict[str, Any]
    files: Annotated[
        dict[
            Annotated[str, Field(max_length=4000), AfterValidator(_inside)],
            Annotated[tuple[Count, Sha256], Field(strict=False)],
        ],
        Field(min_length=1),
    ]


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return out / FOLDER_NAME / f"step-{step:08d}"


def save_checkpoint(
    engine: Any, out: Path, *, step: int, identity: Mapping[str, Any], state: dict[str, Any], ranks: Ranks | None = None
) -> Path:
    """Write the checkpoint of `step`, then drop old ones. Of several processes, all call it, and each writes its part.

    `identity` is what a run must share to go on from it and is kept in the marker as JSON; `state` is anything that
    torch.save takes and comes back from `load_checkpoint`.

    Raises:
        SpaceError, TrainingError: it cannot be written.
    """
    path, ranks = checkpoint_path(out, step), ranks or Ranks()
    # the engine keeps what rank 0 hands it
    client_state = {"kdtrain": {**state, "random": ranks.gather(random_state())}}
    with ranks.together(), explain_write_errors(path):
        if ranks.first and path.exists():  # half-written by a run that was killed
            delete_marked(path, MARKER_NAME)
    try:
        with ranks.together(), explain_write_errors(path), _failures_at_the_end(engine):
            engine.save_checkpoint(str(path.parent), tag=path.name, client_state=client_state, save_latest=False)
        with ranks.together(), explain_write_errors(path):
            if ranks.first:
                seal_checkpoint(path, step=step, processes=ranks.count, identity=identity)
    except DistillationError:
        # nothing takes it for whole, but the space it has is what others lack
        if ranks.first:
            shutil.rmtree(path, ignore_errors=True)
        raise
    with ranks.together(), explain_write_errors(path):
        if ranks.first:
            _drop_old(out, path)
    return path


@contextmanager
def _failures_at_the_end(engine: Any) -> Iterator[None]:
    """What cannot be written fails once all barriers of the engine are behind: the other processes wait in them."""
    failures: list[Exception] = []

    def later(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> Any:
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                failures.append(error)
                return None

        return attempt

    writers = ((engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs"))
    places = [*writers, (engine, "_copy_recovery_script")]
    for owner, name in places:
        setattr(owner, name, later(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in places:
            delattr(owner, name)
    if failures:
        raise failures[0]


def load_checkpoint(
    engine: Any, path: Path, ranks: Ranks | None = None, *, universal: Path | None = None
) -> dict[str, Any]:
    """Bring the engine and the random generators to the state of a checkpoint; returns the `state` it was saved with.

    `universal` is the folder of the same checkpoint in universal form, if the engine reads that. Of more processes than
    wrote it, those beyond keep the state of their generators.

    Raises:
        TrainingError: the checkpoint is not whole, or does not fit the engine.
    """
    check_checkpoint(path)
    folder = universal or path
    try:
        loaded, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise TrainingError(
            f"checkpoint {str(path)!r} does not fit this student ({error}): it would go on from other weights; resume "
            "with the settings it was written with, or start afresh in another --out"
        ) from error
    if loaded is None or "kdtrain" not in client_state:
        raise TrainingError(
            f"checkpoint {str(path)!r} was not written by kdtrain: the place to go on from is unknown; name one of "
            f"OUT/{FOLDER_NAME}/"
        )
    state: dict[str, Any] = client_state["kdtrain"]
    states, rank = state.pop("random"), (ranks or Ranks()).rank
    if rank < len(states):
        set_random_state(states[rank])
    return state


def seal_checkpoint(path: Path, *, step: int, identity: Mapping[str, Any], processes: int = 1) -> None:
    """Write the marker that makes a checkpoint count, after everything it lists is on the disk."""
    files = {str(file.relative_to(path)): _measure(file) for file in _files(path)}
    temporary = path / f"{MARKER_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        marker = {"step": step, "processes": processes, "identity": identity, "files": files}
        json.dump(marker, stream, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    close_to_others(path)
    temporary.replace(path / MARKER_NAME)
    for folder in (path, path.parent):
        flush_to_disk(folder)


def read_marker(path: Path) -> Marker:
    """The marker of a checkpoint, whose files are not looked at.

    Raises:
        TrainingError: there is none at `path`.
    """
    try:
        fields = check_fields(MarkerSchema, parse_json((path / MARKER_NAME).read_bytes()))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"no complete checkpoint at {str(path)!r} ({error}): a half-written one would "
            "resume from wrong weights; name another one, or use --resume auto to take the newest complete one"
        ) from error
    return Marker(**fields.model_dump() | {"files": {name: list(measure) for name, measure in fields.files.items()}})


def check_checkpoint(path: Path) -> Marker:
    """The marker of a whole checkpoint. Cost: every file is read and hashed.

    Raises:
        TrainingError: there is none at `path`, or its files are not those that its marker lists.
    """
    marker = read_marker(path)
    for name, measure in marker.files.items():
        file = path / name
        if not file.is_file() or _measure(file) != measure:
            raise TrainingError(
                f"checkpoint {str(path)!r} is damaged at {name!r}, whose size or SHA-256 is not what was written: it "
                "would resume from wrong weights; delete the folder and use --resume auto to take the one before"
            )
    return marker


def newest_checkpoint(out: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint of a run, or None; `say` is told of damaged ones that are passed over.

    Raises:
        TrainingError: there were whole ones once, and all of them are damaged.
    """
    damage = None
    for path in reversed(_step_folders(out)):
        if not (path / MARKER_NAME).exists():  # half-written
            continue
        try:
            check_checkpoint(path)
        except TrainingError as error:
            damage = damage or error
            say(f"passed over  {error}")
            continue
        return path
    if damage is not None:
        raise TrainingError(
            f"{damage}; and there is no whole one before it: starting afresh would delete what is left of that run; "
            f"restore a checkpoint from a copy, or delete {str(out / FOLDER_NAME)!r} to start from the first step"
        )
    return None


def random_state() -> RandomState:
    """The state of every random generator that training may draw from, that of the current CUDA device among them."""
    return {
        "torch": torch.get_rng_state(),
        # of the device that trains: other devices, and how many there are, are not the run's
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global generator is what a library might draw from
        "python": random.getstate(),
    }


def set_random_state(state: RandomState) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def drop_beyond(out: Path, step: int) -> None:
    """Delete the checkpoints of `out` from beyond `step`, which a run that goes on from there would never have written.

    Half-written ones go too. With step 0 none is left.

    Raises:
        TrainingError: they cannot be deleted.
    """
    with explain_write_errors(out / FOLDER_NAME):
        for path in _step_folders(out):
            if int(path.name.removeprefix("step-")) > step or not (path / MARKER_NAME).exists():
                delete_marked(path, MARKER_NAME)


def _step_folders(out: Path) -> list[Path]:
    found = (out / FOLDER_NAME).glob("step-*")
    return sorted(path for path in found if path.name.removeprefix("step-").isdecimal() and path.is_dir())


def _drop_old(out: Path, written: Path) -> None:
    """Keep the checkpoint just written and the newest others."""
    others = [path for path in _step_folders(out) if (path / MARKER_NAME).exists() and path != written]
    for path in others[: len(others) - (KEPT - 1)]:
        delete_marked(path, MARKER_NAME)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(MARKER_NAME))


def _measure(file: Path) -> list[Any]:
    """[bytes, SHA-256] of a file that has reached the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return [stream.tell(), digest]
