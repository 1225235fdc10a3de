"""Where a command runs: streams that are closed, full or unread, and terminals that know few characters.

One process of a command forks for each case, so that its modules are imported once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "plain": {},
    "ascii": {"encoding": "ascii"},
    "latin-1": {"encoding": "iso-8859-1"},
    "no output": {"close": [1]},
    "no error": {"close": [2]},
    "nothing": {"close": [0, 1, 2]},
    "output unread": {"unread": [1]},
    "error unread": {"unread": [2]},
    "output full": {"full": [1]},
    "error full": {"full": [2]},
}
PROGRAM = r'''
"""Each case in a process that begins as one of Python's does: with streams of the numbers 0 to 2, None where closed."""
import io, json, os, sys, traceback
from pathlib import Path
import cli.eval_fidelity, cli.kdeval
from cli.display import StatusLine
from cli.eval_shared import deliver, print_result
from rich.table import Table

def command(argv):
    status = StatusLine()
    table = Table(title="tïny: Ω ± 1")
    table.add_column("größe")
    table.add_row("中 2 × 3")
    for step in range(3):
        status.note(f"step {step}: Ω")
    deliver('{"score": 1}', Path("record.json"), lambda: print_result([table], ["Ω → 中"]))
    status.note("done")
    return 0

def start(folder, case):
    os.chdir(folder)
    for number in range(3):
        file = os.open({0: os.devnull, 1: "out", 2: "err"}[number], os.O_RDWR | os.O_CREAT, 0o600)
        if number in case.get("full", ()):
            file = os.open("/dev/full", os.O_WRONLY)
        if number in case.get("unread", ()):
            reader, file = os.pipe()
            os.close(reader)
        os.dup2(file, number)
    os.closerange(3, 64)
    for number in case.get("close", ()):
        os.close(number)
    encoding = case.get("encoding", "utf-8")
    closed = lambda number: number in case.get("close", ())
    wrap = lambda number, errors: None if closed(number) else open(number, "w", encoding=encoding, errors=errors)
    sys.stdin = sys.__stdin__ = None if closed(0) else open(0)
    sys.stdout = sys.__stdout__ = wrap(1, "strict")
    sys.stderr = sys.__stderr__ = wrap(2, "backslashreplace")
    from cli.entry import run_command
    code = run_command(command, "kdeval", [])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # as Python does at its end
    return code

answers = {}
for name, case in json.loads(sys.argv[1]).items():
    folder = Path(name.replace(" ", "-")).absolute()
    folder.mkdir()
    child = os.fork()
    if not child:
        code = 99
        try:
            code = start(folder, case)
        except BaseException:
            (folder / "traceback").write_text(traceback.format_exc())
        os._exit(code)
    answers[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(answers))
'''


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder that each case has one of its own in, and the exit codes."""
    folder = tmp_path_factory.mktemp("streams")
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return folder, json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_no_record_is_lost_and_there_is_no_traceback(ran: tuple[Path, dict[str, int]], case: str) -> None:
    folder, codes = ran
    own = folder / case.replace(" ", "-")
    assert not (own / "traceback").exists(), (own / "traceback").read_text()
    assert codes[case] == {"output unread": 141, "output full": 1}.get(case, 0)
    assert json.loads((own / "record.json").read_text()) == {"score": 1}
    # nothing that was printed went into another file
    assert {file.name for file in own.iterdir()} == {"record.json", "out", "err"}


def test_what_an_encoding_lacks_is_written_out(ran: tuple[Path, dict[str, int]]) -> None:
    folder, _ = ran
    assert "note: Ω → 中\n" in (folder / "plain/out").read_text(encoding="utf-8")
    assert "note: \\u03a9 \\u2192 \\u4e2d\n" in (folder / "ascii/out").read_text(encoding="ascii")
    assert "größe" in (folder / "latin-1/out").read_text(encoding="iso-8859-1")
    assert "step 1: \\u03a9\n" in (folder / "latin-1/err").read_text(encoding="iso-8859-1")


def test_a_full_disk_is_one_message(ran: tuple[Path, dict[str, int]]) -> None:
    folder, _ = ran
    said = (folder / "output-full/err").read_text().splitlines()
    assert said[-1].startswith("kdeval: standard output cannot be written (No space left on device)")
