"""The house itself: packaging, commands, pinned versions, and words that have no place in the tree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teacher_cache", "student_train", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
SOURCES = [path for package in (*PACKAGES, "tests", "benchmarks") for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].lower()


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_every_requirement_is_pinned_and_no_pin_is_below_its_bound() -> None:
    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    tested = [line for extra, lines in extras.items() if extra not in ("benchmarks", "dev") for line in lines]
    for line in [*PROJECT["project"]["dependencies"], *tested]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["project"]["name"]:
            continue
        assert requirement.name in pins(), f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins()[requirement.name])


def test_versions_here_are_the_pinned_ones() -> None:
    """What is tested is what constraints.txt says. A build tag such as +cpu is the same version."""
    for name, version in pins().items():
        assert importlib.metadata.version(name).partition("+")[0] == version


def test_torch_pin() -> None:
    assert pins()["torch"] == "2.13.0"


@pytest.mark.parametrize(
    "line, answer",
    [
        ("kdcache --help", "usage: kdcache"),
        ("kdtrain --help", "usage: kdtrain"),
        ("kdeval --help", "usage: kdeval"),
        ("kdcache --version", f"kdcache {VERSION}\n"),
        ("kdtrain --version", f"kdtrain {VERSION}\n"),
        ("kdeval --version", f"kdeval {VERSION}\n"),
        ("kdcache build --teacher bert --version", f"kdcache {VERSION}\n"),
        ("kdeval --completion bash", "complete -o bashdefault -o default -F _kdeval kdeval\n"),
    ],
)
def test_what_each_command_answers_at_once_is_light(line: str, answer: str) -> None:
    """These answer without importing what takes seconds."""
    command, *flags = line.split()
    module, function = PROJECT["project"]["scripts"][command].split(":")
    code = f"""
import atexit, sys
sys.argv = {[command, *flags]!r}
heavy = {{"torch", "transformers", "datasets", "zarr", "deepspeed", "matplotlib"}}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
from {module} import {function}
sys.exit({function}())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert answer in result.stdout
    assert result.stderr.strip() == "[]"


def test_packages_import_without_heavy_libraries() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"


def test_every_module_says_what_it_is() -> None:
    modules = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
    silent = [str(path.relative_to(ROOT)) for path in modules if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_leftovers_in_the_tree() -> None:
    """Marks of unfinished work, and paths of somebody's machine."""
    forbidden = re.compile(
        "|".join([r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b", r"/ho" + r"me/", r"/wo" + r"rk/"])
    )
    pages = [page for folder in (*PACKAGES, "tests", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))]
    others = [ROOT / name for name in ("Makefile", "pyproject.toml", "CITATION.cff", ".ci/run")]
    texts = [*SOURCES, *ROOT.glob("*.md"), *pages, *others]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_continuous_integration_runs_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("make test")


def test_files_lie_beside_a_test_of_their_name() -> None:
    """Where one has none, the face of its wing says which test is its first."""
    alone, files = [], 0
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py" or len(path.read_text().splitlines()) <= 60:
                continue
            files += 1
            named = f"`{path.name}`" in (path.parent / "__init__.py").read_text()
            if not (ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.name}").exists():
                alone.append((str(path.relative_to(ROOT)), named))
    assert len(alone) <= 0.2 * files
    assert [path for path, named in alone if not named] == []


def test_rooms_are_small() -> None:
    """What grows beyond this holds a second subject, which wants a room of its own."""
    lengths = sorted(
        (len(path.read_text().splitlines()), str(path.relative_to(ROOT)))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )
    assert lengths[-1][0] <= 330, lengths[-1]
    assert lengths[len(lengths) // 2][0] <= 140
