"""What the commands of `kdeval` share: printing, records, and errors in writing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.table import Table

from cli.eval_shared import deliver, make_record, print_result, write_record, writes_to
from teacher_cache.errors import SettingsError


def test_a_record_says_what_was_measured_and_with_what() -> None:
    record = make_record("latency", {"seconds": 2})
    assert record["evaluation"] == "latency" and record["seconds"] == 2
    assert {"software", "git_revision", "command", "created"} < record.keys()


def test_notes_follow_the_tables_and_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("what")
    table.add_row("an error of 0.1")
    long = "see [bold] and [1] " + "and so on " * 30
    print_result([table], [long], width=40)
    printed = capsys.readouterr().out
    assert printed.index("an error of 0.1") < printed.index("note: ")
    assert printed.splitlines()[-1] == f"note: {long}", "one line, whatever the width"


def test_a_record_replaces_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"
    for text in ("{1}", "{2}"):
        write_record(text, path)
    assert path.read_text() == "{2}\n" and list(tmp_path.iterdir()) == [path]


def test_a_record_that_cannot_be_written_is_shown_and_told(tmp_path: Path) -> None:
    path, shown = tmp_path / "nowhere" / "fidelity.json", []
    with pytest.raises(SettingsError, match=r"the record was not written to .*fidelity.json' \(No such file"):
        deliver("{}", path, lambda: shown.append("shown"))
    assert shown == ["shown"]


def test_a_record_is_there_before_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"

    def show() -> None:
        assert path.read_text() == "{}\n"
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        deliver("{}", path, show)


def test_what_cannot_be_written_to_out_is_told_as_such(tmp_path: Path) -> None:
    told = r"--out 'here' cannot be written \(No such file or directory\)"
    with pytest.raises(SettingsError, match=told), writes_to("here"):
        (tmp_path / "nowhere" / "file").write_text("")
    with pytest.raises(ZeroDivisionError), writes_to("here"):
        _ = 1 / 0
