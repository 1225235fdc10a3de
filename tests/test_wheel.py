"""The wheel as a user has it: what is in it, and its commands in an environment that holds only what it asks for.

The wheel is built once, from the source archive, as `python -m build` does. The environment is a fresh one outside of
this working copy; the packages that the wheel requires (no extras) are links to those that are installed here, so that
nothing is downloaded. No network.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("cli", "student_train", "teacher_cache")
NOT_OF_COMMANDS = {"all", "benchmarks", "dev", "test"}
"""Extras that no message of a command names."""
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@dataclass(frozen=True, kw_only=True)
class Built:
    sdist: Path
    wheel: Path
    metadata: Message


@dataclass(frozen=True, kw_only=True)
class Installed:
    python: Path

    def run(self, command: str, *arguments: str, folder: Path) -> str:
        """Standard output of a console script, from another folder and with nothing that would lead to this one."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        program = [str(self.python.parent / command), *arguments]
        result = subprocess.run(program, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        assert result.returncode == 0, f"{program}: {result.stdout}{result.stderr}"
        return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Source archive and wheel of a copy: a build leaves files where it runs, and takes up old ones that lie there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-c", BUILD_SDIST, str(out)], source)
    (sdist,) = out.glob("*.tar.gz")
    run([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(sdist)], out)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Built(sdist=sdist, wheel=wheel, metadata=message_from_string(archive.read(name).decode()))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment, required = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("required")
    link_distributions(required_by(built.metadata), required)
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "required.pth").write_text(f"{required}\n")
    python = environment / "bin" / "python"
    run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(built.wheel)], environment)
    return Installed(python=python)


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def run(command: Sequence[str], folder: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def required_by(metadata: Message) -> set[str]:
    """Names of all distributions that come with the wheel where no extra is asked for."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = list(wanted(metadata.get_all("Requires-Dist", []), frozenset()))
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += wanted(importlib.metadata.requires(one[0]) or [], one[1])
    return {name for name, _ in found}


def wanted(lines: Iterable[str], extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """Those of the requirements that count here, by name, with the extras that are asked of them."""
    requirements = map(Requirement, lines)
    return {
        (canonicalize_name(each.name), frozenset(each.extras))
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


def link_distributions(names: Iterable[str], folder: Path) -> None:
    """Into `folder`, the top-level files and folders of installed distributions, by link."""
    for name in names:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or []}
        for top in tops - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))


def test_the_wheel_holds_the_three_packages_and_nothing_else(built: Built) -> None:
    files = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    files |= {f"{name}/py.typed" for name in PACKAGES}
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    info = f"kdcache-{PROJECT['version']}.dist-info"
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert names == files | {f"{info}/{name}" for name in about}
    assert "teacher_cache/build/build.py" in names, "a wing's name is that of a folder which tools like to leave out"


def test_the_source_archive_holds_what_a_wheel_is_made_of(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert tops == {*PACKAGES, "kdcache.egg-info", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml",
                    "setup.cfg"}  # fmt: skip


def test_metadata(built: Built) -> None:
    metadata = built.metadata
    assert (metadata["Name"], metadata["Version"]) == ("kdcache", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == sorted(PROJECT["dependencies"])


def test_extras_are_those_that_messages_name_and_all_has_every_one() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == extras.keys() - NOT_OF_COMMANDS
    texts = [ROOT / "README.md", *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    named = {extra for path in texts for extra in re.findall(r"kdcache\[([\w,-]+)\]", path.read_text())}
    assert named >= everything.extras
    assert named <= extras.keys()


def test_commands_outside_of_the_working_copy(
    installed: Installed, tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    where = "import importlib.util, json, cli, student_train, teacher_cache; print(json.dumps([cli.__file__, "
    where += "student_train.__file__, teacher_cache.__file__, importlib.util.find_spec('scipy') is None]))"
    *files, without_extras = json.loads(installed.run("python", "-c", where, folder=tmp_path))
    environment = installed.python.parents[1]
    assert all(Path(file).is_relative_to(environment) for file in files), files
    assert without_extras
    for command in PROJECT["scripts"]:
        assert installed.run(command, "--version", folder=tmp_path) == f"{command} {PROJECT['version']}\n"
        assert installed.run(command, "--help", folder=tmp_path).startswith(f"usage: {command} ")
    build = ["--teacher", str(tiny_teacher()), "--corpus", str(tiny_corpus), "--seq-len", "32", "--max-rows", "64"]
    assert "64 rows, complete" in installed.run("kdcache", "build", *build, "--block-rows", "16", folder=tmp_path)
    train = ["--method", "mha+hs", "--steps", "2", "--batch-size", "8", "--valid-share", "0.2"]
    assert "student in student (2 steps" in installed.run("kdtrain", *train, folder=tmp_path)
    record = json.loads(installed.run("kdeval", "fidelity", "--json", folder=tmp_path))
    assert record == json.loads((tmp_path / "student" / "fidelity.json").read_text())
    assert (record["software"]["kdcache"], record["git_revision"]) == (PROJECT["version"], None)
