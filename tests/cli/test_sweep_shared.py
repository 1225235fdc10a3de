"""Two processes share a sweep, one of them is killed in the middle; students are measured at the end of each run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cli import sweep_work
from cli.kdtrain import main
from cli.sweep_claims import FOLDER
from student_train.run_files import read_records
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from tests.warm.share import Warm

STEPS = 12
COMMON = f"student: 2x32\nbatch_size: 8\nvalid_every: 100\nsave_every: 5\nsteps: {STEPS}\ndevice: cpu\nmethod: mha\n"


@pytest.fixture(scope="module")
def store(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "cache.zarr"
    settings = {"teacher": str(tiny_teacher("bert")), "corpus": (str(tiny_corpus),), "out": str(out), "device": "cpu"}
    build_cache(BuildSettings(**settings, seq_len=24, max_rows=64, block_rows=8, rows="document", layers="2,4"))
    return out


def sweep_file(folder: Path, store: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(f"cache: {store}\nout: {folder / 'students'}\n{COMMON}{text}")
    return path


# a training, which the first time that one writes step 8 stands still there, whatever it is asked for
HALTING = """
import os, sys, time
from pathlib import Path
from student_train.train.metrics import MetricsLog
from cli.kdtrain import main
write, reached = MetricsLog.write, Path({reached!r})
def write_and_halt(log, record):
    write(log, record)
    if record["step"] == 8 and "loss" in record:
        try:
            os.close(os.open(reached, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        note = reached.with_suffix(".tmp")
        note.write_text(f"{{os.getpid()}} {{sys.argv[sys.argv.index('--out') + 1]}}")
        note.replace(reached)
        while True:
            time.sleep(0.01)
MetricsLog.write = write_and_halt
sys.exit(main(sys.argv[3:]))
"""
# a sweep that measures its students in warm processes, too
SWEEPING = """
import sys
from cli import sweep_work
from cli.kdtrain import main
sweep_work.python = lambda: {python!r}
sys.exit(main(sys.argv[1:]))
"""


def test_what_a_killed_process_leaves_is_taken_over_and_comes_out_as_from_one_process(
    store: Path, warm: Warm, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, halting, sweeping = tmp_path / "reached", tmp_path / "halting.py", tmp_path / "sweeping.py"
    halting.write_text(HALTING.format(reached=str(reached)))
    sweeping.write_text(SWEEPING.format(python=warm.python))
    text = (
        f"launcher: {shlex.join([*warm.python, str(halting)])}\ngrid: {{seed: [0, 1, 2]}}\nevaluate: {{fidelity: }}\n"
    )
    path = sweep_file(tmp_path / "shared", store, text)
    processes = [warm.start([str(sweeping), "--config", str(path)]) for _ in range(2)]
    try:
        while not reached.exists() or not reached.read_text():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        pid, out = reached.read_text().split()
        name = Path(out).name
        holder = json.loads((tmp_path / "shared" / "students" / FOLDER / f"{name}.1").read_text())["pid"]
        killed, other = sorted(processes, key=lambda process: process.pid != holder)
        assert killed.pid == holder
        killed.kill()
        killed.wait()
        os.kill(int(pid), signal.SIGKILL)
        assert other.wait() == 0
    finally:
        for process in processes:
            process.kill()
    monkeypatch.setattr(sweep_work, "python", lambda: warm.python)
    assert main(["--config", str(sweep_file(tmp_path / "alone", store, text))]) == 0
    told = capsys.readouterr()
    assert "measuring fidelity" in told.err and told.out.count("| complete |") == 3
    for run in ("seed0", "seed1", "seed2"):
        shared, alone = (tmp_path / folder / "students" / run for folder in ("shared", "alone"))
        assert (shared / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        for folder in (shared, alone):
            records = read_records(folder / "metrics.jsonl")
            assert [record["step"] for record in records if "loss" in record] == [*range(1, STEPS + 1)]
        losses = [[record.get("loss") for record in read_records(one / "metrics.jsonl")] for one in (shared, alone)]
        assert losses[0] == losses[1]
        found = [json.loads((one / "fidelity.json").read_text())["relations"] for one in (shared, alone)]
        assert found[0] == found[1]
    claims = sorted(path.name for path in (tmp_path / "shared" / "students" / FOLDER).iterdir())
    assert claims == sorted(["seed0.1", "seed1.1", "seed2.1", f"{name}.2"])
    summary = json.loads((tmp_path / "shared" / "students" / "summary.json").read_text())
    assert [run["state"] for run in summary["runs"]] == ["complete"] * 3

    # nothing is left to do, and what is measured otherwise is measured anew
    assert main(["--config", str(path)]) == 0
    assert "training" not in (told := capsys.readouterr().err) and "measuring" not in told
    path.write_text(path.read_text().replace("{fidelity: }", "{fidelity: {rows: 1}}"))
    assert main(["--config", str(path), "--only", "2", "--json"]) == 0
    told = capsys.readouterr()
    assert "training" not in told.err and told.err.count("measuring fidelity") == 1
    assert json.loads((tmp_path / "shared" / "students" / "seed1" / "fidelity.json").read_text())["rows"] == 1
    # an evaluation that fails is the run's end, and is tried again
    path.write_text(path.read_text().replace("{rows: 1}", "{cache: nothing.zarr}"))
    assert main(["--config", str(path), "--only", "seed1"]) == 1
    told = capsys.readouterr()
    assert "| fidelity failed (1) |" in told.out and "1 of 1 runs failed" in told.err


def test_only_the_chosen_runs_are_trained_and_the_summary_knows_the_others(
    store: Path, warm: Warm, tmp_path: Path, capsys: Any
) -> None:
    runs = "runs: {a: {steps: 1}, b: {steps: 0}, c: {steps: 0, seed: 4}}\n"
    path = sweep_file(tmp_path, store, f"launcher: {shlex.join(warm.python)}\n{runs}")
    assert main(["--config", str(path), "--only", "3", "b", "--json"]) == 0
    told = capsys.readouterr()
    assert {run["name"]: run["state"] for run in json.loads(told.out)["runs"]} == {
        "a": "not started", "b": "complete", "c": "complete",
    }  # fmt: skip
    assert "[2/3] b: training" in told.err and "[3/3] c: training" in told.err and "[1/3]" not in told.err
    assert sorted(folder.name for folder in (tmp_path / "students").glob("?")) == ["b", "c"]
    # folders count, not what was once said of them
    shutil.rmtree(tmp_path / "students" / "b")
    assert main(["--config", str(path), "--only", "c", "--json"]) == 0
    states = {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states == {"a": "not started", "b": "not started", "c": "complete"}


@pytest.mark.parametrize(
    "typed, told",
    [
        (["--only", "4"], "--only '4' is the number of no run: "),
        (["--only", "0"], "has 3, counted from 1, so an array of jobs for all of them is --array=1-3"),
        (["--only", "9" * 5000], "is the number of no run"),
        (["--only", "alpa"], "did you mean 'alpha'?"),
        (["--only", "zzz"], "there are 'alpha', 'b', 'c'"),
        (["--only", "b", "--only", "c"], "--only is given 2 times"),
        (["--only"], "--only: expected at least one argument"),
        (["--price-per-hour", "2"], "--price-per-hour 2.0 changes nothing in a training: add --dry-run"),
        (["--dry-run", "--price-per-hour=-2"], "--price-per-hour -2.0 is no price"),
        (["--dry-run", "--price-per-hour=nan"], "--price-per-hour nan is no price"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: Any, typed: list[str], told: str
) -> None:
    path = sweep_file(tmp_path, tmp_path / "no.zarr", "runs: {alpha: {seed: 1}, b: {seed: 2}, c: {seed: 3}}\n")
    try:
        code = main(["--config", str(path), *typed])
    except SystemExit as leaving:
        code = leaving.code
    assert code in (1, 2) and told in capsys.readouterr().err
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize("typed", [["--only", "a"], ["--no-wait"], ["--price-per-hour", "2"]])
def test_what_is_of_sweeps_or_dry_runs_is_refused_of_one_training(capsys: Any, typed: list[str]) -> None:
    assert main(["--method", "mha", *typed]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"kdtrain: {typed[0]}") and "leave it out" in told


@pytest.mark.parametrize(
    "section, told",
    [
        ("fidelity", "'evaluate' is 'fidelity', where a mapping is expected"),
        ("[fidelity]", "'evaluate' is ['fidelity'], where a mapping is expected"),
        ("{compare: {}}", "'evaluate' asks for 'compare', which measures no student; it can be fidelity, finetune"),
        ("{fidelity: 3}", "'fidelity' of 'evaluate' is '3', where flags of `kdeval fidelity` are expected"),
        ("{fidelity: {row: 3}}", "sets 'row', which kdeval fidelity does not know; did you mean 'rows'?"),
        ("{fidelity: {rows: 0}}", "'fidelity' of 'evaluate': --rows 0 leaves nothing to measure on"),
        ("{fidelity: {rows: many}}", "that is 'fidelity' of 'evaluate' in"),
        ("{fidelity: {student: other}}", "'fidelity' of 'evaluate' sets 'student', which the sweep sets for each run"),
        ("{fidelity: [{rows: 2}, {rows: 2}]}", "'evaluate' asks for the same twice"),
        ("{fidelity: [{rows: 2}, {rows: 0}]}", "'fidelity 2' of 'evaluate': --rows 0 leaves nothing"),
        ("{finetune: {}}", "finetune"),
    ],
)
def test_what_cannot_be_measured_is_found_before_the_first_run(
    tmp_path: Path, capsys: Any, section: str, told: str
) -> None:
    path = sweep_file(tmp_path, tmp_path / "no.zarr", f"grid: {{seed: [1, 2]}}\nevaluate: {section}\n")
    for further in ([], ["--dry-run"]):
        try:
            code = main(["--config", str(path), *further])
        except SystemExit as leaving:
            code = leaving.code
        assert code in (1, 2) and told in capsys.readouterr().err
    assert not (tmp_path / "students").exists()


def test_the_whole_sweep_is_measured_alike(tmp_path: Path, capsys: Any) -> None:
    path = sweep_file(tmp_path, tmp_path / "no.zarr", "runs: {a: {evaluate: {fidelity: {}}}, b: {seed: 2}}\n")
    assert main(["--config", str(path)]) == 1
    assert "run 'a' sets 'evaluate', which is of the whole sweep" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_slurm_script_of_the_page_queues_again_what_was_stopped(tmp_path: Path, code: int) -> None:
    page = (Path(__file__).resolve().parents[2] / "cli" / "README.md").read_text()
    script = next(text for text in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "# sweep.sh" in text)
    for name, ends_with in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {ends_with}\n')
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "71"}
    found = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    said = ["srun kdtrain --config /shared/sweep.yaml --only 3"]
    assert found.returncode == code and found.stderr == ""
    assert found.stdout.splitlines() == (said if code != 143 else [*said, "scontrol requeue 71"])
