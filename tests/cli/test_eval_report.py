"""`kdeval report`: where the file goes, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.kdeval import main


@pytest.fixture
def run(tiny_teacher_copy: Any) -> Path:
    """A model from elsewhere, without any record."""
    return Path(tiny_teacher_copy("bert"))


def test_the_report_lies_in_the_run_unless_out_says_otherwise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "loading PyTorch\n" and printed.out.startswith(f"written to {run / 'report.html'} (")
    page = (run / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "kdeval fidelity" in page
    assert main(["report", str(run), "--out", str(tmp_path / "other.html")]) == 0
    assert f"written to {tmp_path / 'other.html'}" in capsys.readouterr().out
    assert main(["report", str(run), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(run / "report.html"), "bytes": (run / "report.html").stat().st_size,
    }  # fmt: skip
    assert (tmp_path / "other.html").read_text().startswith("<!DOCTYPE html>")


def test_a_place_that_cannot_be_written_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nowhere" / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 1
    assert f"--out {str(out)!r} cannot be written (No such file or directory)" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path)]) == 1
    assert f"--out {str(tmp_path)!r} cannot be written (it is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [run.name], "nothing is left of the attempt"


def test_no_run_is_no_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run)
    assert main(["report", str(run)]) == 1
    printed = capsys.readouterr()
    assert repr(str(run)) in printed.err and "Traceback" not in printed.err and not run.exists()
