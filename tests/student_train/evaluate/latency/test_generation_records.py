"""Timings of generation: as JSON and back, and as tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, Group

from student_train.evaluate.latency.generation_records import (
    Generation,
    GenerationSetup,
    GenerationTiming,
    generation_from_json,
    generation_json,
    generation_tables,
)

SETUP = GenerationSetup(
    backend="pytorch", device="cpu", dtype="float32", threads=1, batch_size=4, prompt_tokens=128, new_tokens=32
)
ALONE = GenerationTiming(first_token_ms=12.5, first_token_p90_ms=15.0, tokens_per_second=2000.0, runs=9)
BESIDE = replace(ALONE, teacher_first_token_ms=50.0, teacher_tokens_per_second=500.0)


def render(*measured: Generation) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(Group(*generation_tables(measured)))
    return captured.get()


def test_speedups() -> None:
    assert (BESIDE.first_token_speedup, BESIDE.speedup) == (4.0, 4.0)
    assert ALONE.speedup is ALONE.first_token_speedup is None
    assert str(SETUP) == "pytorch on CPU (1 thread), float32, batch 4, 32 tokens after a prompt of 128"


@pytest.mark.parametrize("timing", [ALONE, BESIDE])
def test_json_and_back(timing: GenerationTiming) -> None:
    record = json.loads(json.dumps(generation_json(SETUP, timing)))
    assert generation_from_json(record) == (SETUP, timing)
    assert record["speedup"] == timing.speedup


@pytest.mark.parametrize(
    "entry, value", [("batch_size", 0), ("runs", "3"), ("tokens_per_second", 0), ("teacher_first_token_ms", -1.0)]
)
def test_numbers_that_cannot_be(entry: str, value: Any) -> None:
    with pytest.raises(ValueError):
        generation_from_json({**generation_json(SETUP, BESIDE), entry: value})


def test_tables() -> None:
    text = render((SETUP, BESIDE), (replace(SETUP, device="cuda"), BESIDE))
    assert "pytorch, CPU (1 thread), float32, 32 tokens after each prompt" in text and "pytorch, GPU" in text
    line = next(line for line in text.splitlines() if " 128 " in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["4", "128", "12.5", "50.0", "4.00x", "2,000", "500.0", "4.00x"]
    assert "…" not in text  # fits into 80 columns
    assert "teacher" not in render((SETUP, ALONE))
