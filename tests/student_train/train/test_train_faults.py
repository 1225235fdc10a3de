"""Trainings that are killed or asked to stop at any moment go on as if nothing had been.

KDCACHE_FAULTS sets how often. Each training is a process of its own at the cost of a fork: `TRAININGS` has
everything imported and forks one child after the other, all with one thread, so that they give the same bits.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from student_train.run_files import read_records
from tests.records import without_times
from tests.warm.share import Warm

FAULTS = int(os.environ.get("KDCACHE_FAULTS", "3"))
STEPS = 12

TRAININGS = """
import json, os, signal, sys
from student_train.settings import TrainSettings
from student_train.train.train import train

def child(order):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        writes = event in ("open", "os.rename", "os.mkdir", "os.remove")
        if writes and any(order["within"] in str(argument) for argument in arguments):
            seen += 1
            if seen == order["at"]:
                os.kill(os.getpid(), order["signal"])
    sys.addaudithook(count)
    result = train(TrainSettings(**{**order["settings"], "cache": tuple(order["settings"]["cache"])}))
    print(seen)
    return 0 if result.stopped_by is None else 128 + result.stopped_by

answer = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = child(order)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answer, flush=True)
"""


class Trainings:
    """Runs trainings one after the other, each killed by a signal in front of a file operation if asked to."""

    def __init__(self, warm: Warm, store: Path, folder: Path) -> None:
        self.store, self.output = store, folder / "output.txt"
        self.server = subprocess.Popen(
            [*warm.python, "-c", TRAININGS],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, out: Path, *, at: int = 0, signal: int = 9, within: str | None = None) -> int:
        """The exit code; `at` is the number of the operation on paths with `within` in them (0: none)."""
        settings = {
            "method": "mha+hs",
            "mapping": "emd",
            "cache": [str(self.store)],
            "out": str(out),
            "steps": STEPS,
            "batch_size": 16,
            "lr": 2e-3,
            "valid_share": 0.05,
            "valid_every": 5,
            "save_every": 4,
            "resume": "auto",
            "device": "cpu",
        }
        order = {"settings": settings, "at": at, "signal": signal, "within": within or str(out)}
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(order | {"output": str(self.output)}), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def operations(self) -> int:
        """File operations of the last run, which went to its end."""
        return int(self.output.read_text().split()[-1])

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def trainings(tiny_store: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainings = Trainings(warm, tiny_store, tmp_path_factory.mktemp("trainings"))
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A finished training, its file operations, and those among them within its checkpoints."""
    counts = []
    for within in (None, "checkpoints/step-"):
        out = tmp_path_factory.mktemp("whole") / "student"
        assert trainings.run(out, within=within) == 0, trainings.output.read_text()
        counts.append(trainings.operations())
    return out, counts[0], counts[1]


def assert_same(out: Path, other: Path) -> None:
    ours, theirs = (without_times(read_records(folder / "metrics.jsonl")) for folder in (out, other))
    assert ours == theirs
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not list(out.glob(".*")) and not list((out / "checkpoints").glob(".*"))


@pytest.mark.timeout(3000)
def test_a_training_killed_at_any_moment_ends_with_the_same_student(
    trainings: Trainings, uninterrupted: tuple[Path, int, int], tmp_path: Path
) -> None:
    """In front of any file operation: in the midst of steps, checkpoints, validations, the export."""
    whole, operations, _ = uninterrupted
    seed = random.SystemRandom().randrange(10**9)
    draw = random.Random(seed)
    for fault in range(FAULTS):
        out, at = tmp_path / f"killed-{fault}", draw.randint(1, operations)
        assert trainings.run(out, at=at) == -9, f"seed {seed}: {at} of {operations}"
        # killed once more on its way, unless it gets to its end
        assert trainings.run(out, at=draw.randint(1, operations)) in (-9, 0)
        assert trainings.run(out) == 0, f"seed {seed}: {at} of {operations}: {trainings.output.read_text()}"
        assert_same(out, whole)


@pytest.mark.timeout(3000)
def test_a_training_asked_to_stop_while_it_saves_saves_and_goes_on(
    trainings: Trainings, uninterrupted: tuple[Path, int, int], tmp_path: Path
) -> None:
    whole, _, operations = uninterrupted
    seed = random.SystemRandom().randrange(10**9)
    draw = random.Random(seed)
    for fault in range(FAULTS):
        # not in the last checkpoint, after which there is nothing left to stop
        out, at = tmp_path / f"stopped-{fault}", draw.randint(1, operations // 2)
        code = trainings.run(out, at=at, signal=15, within="checkpoints/step-")
        assert code == 128 + 15, f"seed {seed}: {at} of {operations}: {code}, {trainings.output.read_text()}"
        assert list(out.glob("checkpoints/*/complete.json"))
        assert trainings.run(out) == 0, trainings.output.read_text()
        assert_same(out, whole)
