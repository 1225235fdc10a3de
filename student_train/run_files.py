"""Where an artifact comes from: software versions, the revision of this code, the command line, and when.

Costs a few milliseconds and two calls of git where the code lies in a working copy. Imports none of the packages whose
versions it reports. What was trained on what is for the caller to add.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"
"""Of a student's directory, the file that says where it comes from; written last."""
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


def run_provenance() -> dict[str, Any]:
    """A JSON object: `software` (versions by package), `git_revision` (or null), `command`, `created` (UTC)."""
    return {
        "software": software_versions(),
        "git_revision": git_revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
