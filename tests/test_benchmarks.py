"""Every script of benchmarks/ finds what it imports from here: they are seldom run, and no type checker reads them."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))
PACKAGES = ("teacher_cache", "student_train", "cli")


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules, each with the name that is taken from it if one is; also those that only a function imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def names_of(script: Path) -> set[str]:
    """What a script has to give at its top level, by its text: running it may take what is not installed."""
    found: set[str] = set()
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            found |= {alias.asname or alias.name for alias in getattr(node, "names", [])}
    return found


def missing(module: str, name: str | None) -> str | None:
    """What cannot be found of an import, in words; what is neither ours nor another script is taken to be there."""
    neighbour = BENCHMARKS / f"{module}.py"
    if neighbour.exists():
        return None if name is None or name in names_of(neighbour) else f"{name} of benchmarks/{neighbour.name}"
    if module.partition(".")[0] not in PACKAGES:
        return None
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return module
    is_there = name is None or hasattr(found, name) or (hasattr(found, "__path__") and find_spec(f"{module}.{name}"))
    return None if is_there else f"{name} of {module}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_finds_what_it_imports(script: Path) -> None:
    found = list(imports(ast.parse(script.read_text(encoding="utf-8"))))
    assert [words for module, name in found if (words := missing(module, name))] == []


@pytest.mark.parametrize("record", sorted((BENCHMARKS / "results").glob("*.jsonl")), ids=lambda record: record.stem)
def test_a_record_says_where_it_comes_from(record: Path) -> None:
    """What was measured, by which command, of which revision, on which machine and with which versions."""
    for line in record.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        assert {"benchmark", "command", "git_revision", "machine", "software"} <= said.keys()
        # folders of the machine that it was measured on are nobody's business
        assert not re.search(r"/(home|root|tmp|work)/", line)
    assert f"`{record.name}`" in (BENCHMARKS / "results" / "README.md").read_text(encoding="utf-8")


def test_what_is_missing_is_found() -> None:
    assert missing("teacher_cache.wording", "format_bytes") is missing("record", "print_record") is None
    assert missing("teacher_cache", "build_cache") is missing("teacher_cache.read", "reader") is None
    assert missing("teacher_cache.wording", "renamed") == "renamed of teacher_cache.wording"
    assert missing("teacher_cache.gone", "anything") == "teacher_cache.gone"
    assert missing("teacher_cache.read", "renamed") == "renamed of teacher_cache.read"
    assert missing("record", "renamed") == "renamed of benchmarks/record.py"
