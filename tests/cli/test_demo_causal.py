"""The demo of causal models at toy size, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.demo_causal import CausalDemoSettings, main, next_commands
from cli.demo_steps import run_step
from tests.causal_models import save_teacher, write_corpus


def test_demo_causal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    corpus, held_out = (write_corpus(tmp_path / f"{seed}.txt", documents=80, seed=seed) for seed in (1, 2))
    out = tmp_path / "demo"
    flags = {"teacher": str(teacher), "corpus": str(corpus), "held_out": str(held_out), "out": str(out)}
    sizes = {"student": "2x32", "max_rows": 24, "seq_len": 32, "steps": 3, "batch_size": 4}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in (flags | sizes).items()]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    assert "$ kdcache build --teacher" in printed.err and "$ kdeval perplexity --student" in printed.err
    assert "perplexity" in printed.out
    assert (out / "training.png").stat().st_size > 10_000
    compared = json.loads((out / "comparison" / "comparison.json").read_text())
    assert [row["name"] for row in compared["rows"]] == ["untrained", "student"]
    commands = next_commands(out, CausalDemoSettings(**flags, **sizes))
    for command in commands:
        assert " ".join(command[1:]) in printed.out
    assert run_step(commands[0]) == 0
