"""What `--help` of every command looks like on a terminal of 80 columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import tyro

from cli import kdcache, kdeval, kdtrain
from cli.examples import EXAMPLES
from cli.options import parse
from student_train.settings import METHODS, TrainSettings

SETTINGS = {
    "kdtrain": TrainSettings,
    **{f"kdcache {name}": command.settings for name, command in kdcache.COMMANDS.items()},
    **{f"kdeval {name}": command.settings for name, command in kdeval.COMMANDS.items()},
}
BOX = re.compile(r"\W+([\w-]* ?options|positional arguments)\W+$")
MAINS = {"kdcache": kdcache.main, "kdeval": kdeval.main, "kdtrain": kdtrain.main}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(prog: str, capsys: pytest.CaptureFixture[str]) -> str:
    name, *command = prog.split()
    with pytest.raises(SystemExit) as left:
        MAINS[name]([*command, "--help"])
    captured = capsys.readouterr()
    assert left.value.code == 0 and captured.err == ""
    return captured.out


@pytest.mark.parametrize("prog", [*SETTINGS, "kdcache", "kdeval"])
def test_no_line_is_longer_than_the_terminal(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(prog, capsys)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "None" not in text and "\x1b" not in text


def test_every_method_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("kdtrain", capsys)
    assert [method for method in METHODS if f" {method} (" not in text] == []


@pytest.mark.parametrize("prog", SETTINGS)
def test_two_examples_are_shown(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(prog, capsys)
    assert len(EXAMPLES[prog]) == 2 and all(f"\n  {example}\n" in text for example in EXAMPLES[prog])


@pytest.mark.parametrize("prog", SETTINGS)
def test_flags_stand_under_headings_with_the_common_ones_in_front(
    prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(prog, capsys).splitlines()
    boxes = [found[1] for line in lines if (found := BOX.match(line))]
    assert boxes[-1] == "output options" and "main options" not in boxes
    flags = boxes[1:] if boxes[0] == "positional arguments" else boxes
    assert flags[0] == "options" and len(set(flags)) == len(flags)
    last = next(number for number, line in enumerate(lines) if "output options" in line)
    assert [number > last for number, line in enumerate(lines) if line[2:8] == "--json"] == [True]


def test_every_command_that_reports_something_does_so_in_json() -> None:
    assert [prog for prog, settings in SETTINGS.items() if "json" not in settings.__dataclass_fields__] == []


@dataclass(frozen=True, kw_only=True)
class Parent:
    student: str = "student"
    """A model
    of two lines."""


@dataclass(frozen=True, kw_only=True)
class Settings(Parent):
    """Do something."""

    rows: Annotated[tuple[int, ...], tyro.conf.Positional] = (3,)
    """Named as a heading is."""
    kind: Literal["a", "b"] | None = None
    """One of two (default: neither)."""
    count: int = 0
    """How many."""
    several: tuple[str, ...] = field(default=("x", "y"))
    """Some."""
    device: str = "auto"
    """Where."""


def read(*argv: str) -> Any:
    return parse(Settings, argv, "kdeval new")


def test_a_command_that_nobody_wrote_headings_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Its fields stand where those of the same name do, or with the field before them."""
    assert read() == Settings()
    assert read("1", "2", "--kind", "b", "--several", "z").kind == "b"
    assert read("1", "2").rows == (1, 2)
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    model = text[text.index("model options") : text.index("run options")]
    for shown in ("A model of two lines. (default: student)", "--kind {a,b}", "neither).  ", "How many. (default: 0)"):
        assert shown in model
    assert "--several STR ..." in model and "(default: x y)" in model
    assert "[ROWS ...]" in text[: text.index("model options")]
