"""Examples of `--help`: each is a call of its command that its flags allow."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cli.examples import EXAMPLES
from cli.options import parse
from tests.cli.test_help_page import SETTINGS


@pytest.mark.parametrize("prog", SETTINGS)
def test_examples_parse(prog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES[prog]:
        words = shlex.split(example)
        assert words[: len(prog.split())] == prog.split()
        assert isinstance(parse(SETTINGS[prog], words[len(prog.split()) :], prog), SETTINGS[prog])


def test_no_example_is_of_a_command_that_is_not() -> None:
    assert EXAMPLES.keys() == SETTINGS.keys()
