"""Two files of a run's folder: what goes into `provenance.json`, and reading `metrics.jsonl`.

`run_provenance` says where any result comes from: software versions, the revision of this code, the command line, and
the time. The caller adds what was trained on what. It costs a few milliseconds, and two calls of git in a working copy;
it imports none of the packages whose versions it reports. `read_records` reads the records of a training's steps and
validations, `read_curves` those of a training that has left all that curves and sums are made of.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from student_train.run_schemas import MetricsSchema, StepSchema, ValidationSchema
from teacher_cache.errors import TrainingError
from teacher_cache.fields import check_fields
from teacher_cache.outside import parse_record

PROVENANCE = "provenance.json"
"""Of a student's directory, the file that says where it comes from; written last."""
FINETUNED = "finetuned.json"
"""Of the directory of a fine-tuned model, the file that says which task it is for and what was measured of it."""
TRIMMED = "trim.json"
"""Of the directory of a model, the record of `kdeval trim`, which cut its vocabulary."""
PACKAGES = (
    "kdcache",
    "torch",
    "transformers",
    "deepspeed",
    "zarr",
    "numcodecs",
    "numpy",
    "tokenizers",
    "safetensors",
    "onnxruntime",
)
METRICS_NAME = "metrics.jsonl"


def run_provenance() -> dict[str, Any]:
    """A JSON object: `software` (versions by package), `git_revision` (or null), `command`, `created` (UTC)."""
    return {
        "software": software_versions(),
        "git_revision": git_revision(),
        # `python -m cli.kdtrain` runs a file, and is typed as any other
        "command": shlex.join([Path(sys.argv[0]).name.removesuffix(".py"), *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, as installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str | None:
    """The commit this code runs from, with `-dirty` where files differ from it; None outside its working copy.

    An installed package may lie inside some other project's working copy, whose commits say nothing about this code.
    """
    file = Path(__file__)
    try:
        _ask_git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _ask_git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _ask_git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return answer.stdout.strip()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        TrainingError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [_read_record(line, place) for place, line in enumerate(lines, 1)]
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{str(path)!r} cannot be read ({error}): what the training did is lost; restore the file, or delete it to "
            "do without the records up to now"
        ) from error


def _read_record(line: str, place: int) -> dict[str, Any]:
    try:
        record: dict[str, Any] = parse_record(line)
        check_fields(MetricsSchema, record)
    except ValueError as error:
        raise ValueError(f"line {place}: {error}") from error
    return record


def read_curves(path: Path) -> list[dict[str, Any]]:
    """`read_records`, each of which has what curves and sums are made of.

    Raises:
        TrainingError: the file is damaged, or a record lacks something.
    """
    records = read_records(path)
    check_curves(path, records)
    return records


def check_curves(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse records of a training, from the first one on, of which one lacks what curves and sums are made of.

    Raises:
        TrainingError: one does.
    """
    for place, record in enumerate(records, 1):
        try:
            check_fields(StepSchema if "loss" in record else ValidationSchema, record)
        except ValueError as error:
            raise TrainingError(
                f"{str(path)!r} is no record of a training: line {place}: {error}; restore the file, or delete it to "
                "leave the curves out"
            ) from error
