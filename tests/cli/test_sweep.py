"""Sweeps as a user runs them: one file, many students, stopped and gone on with, one of them impossible."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cli.kdtrain import main
from student_train.run_files import read_records
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings

COMMON = "student: 2x32\nbatch_size: 8\nvalid_every: 100\nsave_every: 5\nseed: 3\ndevice: cpu\n"


@pytest.fixture(scope="module")
def store(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "cache.zarr"
    settings = {"teacher": str(tiny_teacher("bert")), "corpus": (str(tiny_corpus),), "out": str(out), "device": "cpu"}
    sizes = {"seq_len": 24, "max_rows": 64, "block_rows": 8, "rows": "document", "layers": "2,4"}
    build_cache(BuildSettings(**settings, **sizes))
    return out


def sweep_file(folder: Path, store: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(f"cache: {store}\nout: {folder / 'students'}\n{COMMON}{text}")
    return path


def test_a_dry_run_lists_every_run_with_all_its_flags(store: Path, tmp_path: Path, capsys: Any) -> None:
    path = sweep_file(
        tmp_path,
        store,
        "runs:\n  mha: {method: mha}\n  hs: {method: hs, mapping: '1:2'}\n"
        "grid:\n  lr: [1e-3, 2e-3]\n  init: [random]\n",
    )
    assert main(["--config", str(path), "--dry-run", "--steps", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["mha-lr1e-3-random", "mha-lr2e-3-random", "hs-lr1e-3-random", "hs-lr2e-3-random"]
    assert [line.split(":")[0] for line in lines] == names
    flags = shlex.split(lines[3])
    for part in ("--mapping=1:2", "--lr=2e-3", "--student=2x32", "--seed=3", str(tmp_path / "students" / names[3])):
        assert part in flags
    assert flags[flags.index("--steps") + 1] == "7"
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize(
    "text, told",
    [
        ("runs: {a: {method: mha}, b: {methood: hs}}", "sets 'methood', which kdtrain does not know"),
        ("runs: {a: {method: mha}, b: {method: hx}}", "run 'b': --method 'hx' cannot be read"),
        ("runs: [mha, hs]", "'runs' is ['mha', 'hs'], where a mapping"),
        ("method: mha\ngrid: {seed: 1}", "grid 'seed' is '1', where a list"),
        ("method: mha\ngrid: {init: [a/b, a_b]}", "two runs are called 'a_b'"),
        ("method: mha\nruns: {a: {seed: 1}, b: {lr: 1}, a: {seed: 2}}", "'a' is given twice"),
        ("method: mha\nruns: {a: {}, b: {init: auto}}", "runs 'a' and 'b' have the same settings"),
        ("method: mha\nruns: {../a: {lr: 1}}", "a run cannot be called '../a'"),
        ("method: mha\nruns:", "'runs' is '', where a mapping"),
        ("method: mha\nruns: {a: {}, b: {dry_run: true}}", "run 'b' sets 'dry_run', which is of the whole sweep"),
        ("method: mha\nruns: {a: {}, b: {lr: high}}", "that is run 'b' of"),
    ],
)
def test_what_cannot_be_is_found_before_the_first_run(
    store: Path, tmp_path: Path, capsys: Any, text: str, told: str
) -> None:
    try:
        code = main(["--config", str(sweep_file(tmp_path, store, text + "\nsteps: 1\n"))])
    except SystemExit as leaving:
        code = leaving.code
    assert code in (1, 2) and told in capsys.readouterr().err
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize("typed", [True, False])
def test_students_are_not_written_to_an_address(store: Path, tmp_path: Path, capsys: Any, typed: bool) -> None:
    path, address = sweep_file(tmp_path, store, "method: mha\nsteps: 1\nruns: {a: {}}\n"), "s3://bucket/students"
    if not typed:
        lines = path.read_text().splitlines()
        path.write_text("\n".join(f"out: {address}" if line.startswith("out:") else line for line in lines))
    assert main(["--config", str(path), "--dry-run", *(["--out", address] if typed else [])]) == 1
    assert f"--out '{address}{'' if typed else '/a'}' is an address" in capsys.readouterr().err


def test_what_is_typed_takes_the_place_of_what_is_written(store: Path, tmp_path: Path, capsys: Any) -> None:
    """Flags of several values may come but once, and a name must not tell another value than the run has."""
    path = sweep_file(tmp_path, store, "method: mha\nsteps: 1\ngrid: {cache: [a.zarr, [b.zarr, c.zarr]]}\n")
    assert main(["--config", str(path), "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert (
        "--cache a.zarr --student" in first and "--cache b.zarr c.zarr --student" in second and str(store) not in first
    )
    path = sweep_file(tmp_path, store, "method: mha\nsteps: 1\ngrid: {lr: [1, 2]}\n")
    assert main(["--config", str(path), "--dry-run", "--cache", "d.zarr", "--out", "elsewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("--cache d.zarr --out elsewhere --out elsewhere/lr1")
    assert main(["--config", str(path), "--dry-run", "--lr", "3"]) == 1
    assert "--lr is typed and the grid varies it" in capsys.readouterr().err


def test_a_typed_value_that_is_spelt_like_a_flag_is_no_flag(store: Path, tmp_path: Path, capsys: Any) -> None:
    path = sweep_file(tmp_path, store, "method: mha\nsteps: 1\nruns: {a: {lr: 1}, b: {lr: 2}}\n")
    assert main(["--config", str(path), "--dry-run", "--out", "student", "--local-cache", "lr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("--student=2x32" in line, f"--lr={rate}" in line) for rate, line in enumerate(lines, 1)] == [
        (True, True)
    ] * 2


def test_the_home_folder_of_a_file_is_the_users(
    store: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "sweep.yaml"
    path.write_text(f"cache: ~/cache.zarr\nout: ~/students\n{COMMON}method: mha\nsteps: 1\nruns: {{a: {{}}}}\n")
    (tmp_path / "cache.zarr").symlink_to(store)
    assert main(["--config", str(path)]) == 0
    assert (tmp_path / "students" / "a" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(["--cache", str(store), "--method", "mha", "--steps=0", "--out=~/alone", "--device=cpu"]) == 0
    assert (tmp_path / "alone" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "number, behaviour, code, states",
    [
        (None, "kill -9 $$", 1, ["failed (SIGKILL)", "failed (SIGKILL)"]),
        # a launcher need not end with the code of the signal that stopped it
        (signal.SIGTERM, "trap 'exit 7' TERM", 143, ["stopped", "not started"]),
        (signal.SIGINT, "trap 'exit 7' INT", 130, ["stopped", "not started"]),
    ],
)
def test_a_sweep_tells_what_was_killed_from_what_was_stopped(
    store: Path, tmp_path: Path, capsys: Any, number: Any, behaviour: str, code: int, states: list[str]
) -> None:
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f"{behaviour}\ntouch {tmp_path}/started\nwhile :; do sleep 0.02; done\n")
    text = f"method: mha\nsteps: 1\nlauncher: bash {launcher}\nruns: {{a: {{}}, b: {{seed: 5}}}}\n"
    path = sweep_file(tmp_path, store, text)
    if number is not None:
        threading.Thread(target=send_once, args=(tmp_path / "started", number), daemon=True).start()
    assert main(["--config", str(path), "--json"]) == code
    record = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in record["runs"]] == states
    assert json.loads((tmp_path / "students" / "summary.json").read_text()) == record


def send_once(started: Path, number: int) -> None:
    while not started.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_a_training_does_not_outlive_a_killed_sweep(tmp_path: Path) -> None:
    """It would write into the same folder as the sweep that resumes."""
    code = "from cli.sweep import start\nprint(start(['sleep', '60']).pid, flush=True)\nimport time; time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    training = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while (state := process_state(training)) not in (None, "Z"):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def process_state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def test_one_process_of_several_is_refused(store: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", str(sweep_file(tmp_path, store, "steps: 1\nruns: {a: {method: mha}}\n"))]) == 1
    assert "launcher: torchrun" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_stopped_sweep_goes_on_and_a_run_that_fails_does_not_stop_it(
    store: Path, tmp_path: Path, capsys: Any
) -> None:
    runs = "  one: {method: mha}\n  impossible: {method: hs, mapping: '1:3'}\n  last: {method: mha, steps: 2}\n"
    text = f"steps: 400\nruns:\n{runs}"
    path, out = sweep_file(tmp_path, store, text), tmp_path / "students"
    command = [
        sys.executable,
        "-c",
        "import sys; from cli.kdtrain import main; sys.exit(main())",
        "--config",
        str(path),
    ]
    process = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_records(out / "one" / "metrics.jsonl")) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped" in output and "not started" in output
    done = max(record["step"] for record in read_records(out / "one" / "metrics.jsonl"))
    assert done < 400 and not (out / "last").exists()

    assert main(["--config", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    runs = {run["name"]: run for run in json.loads(captured.out)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "one": "complete", "impossible": "failed (1)", "last": "complete",
    }  # fmt: skip
    assert runs["one"]["steps"] == 400 and runs["last"]["differs"] == {"method": "mha", "steps": "2"}
    assert [record["step"] for record in read_records(out / "one" / "metrics.jsonl") if "loss" in record] == [
        *range(1, 401)
    ]
    assert json.loads((out / "summary.json").read_text()) == json.loads(captured.out)
    assert "method hs, mapping 1:3" in (out / "summary.md").read_text()
    assert runs["one"]["last"].keys() == {"step", "loss", "mha"} == runs["one"]["best"].keys()
    assert runs["one"]["last"]["step"] == 400 and runs["one"]["best"]["loss"] <= runs["one"]["last"]["loss"]

    # other settings in a folder that holds a finished student
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    assert main(["--config", str(path)]) == 1
    assert "run 'one'" in (told := capsys.readouterr().err) and "--seed was 3 and is 4" in told
