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
from cli.options import read_config
from cli.sweep_file import expand
from student_train.run_files import read_records
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.read.pool import open_caches
from tests.warm.share import Warm

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
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    names = ["mha-lr1e-3-random", "mha-lr2e-3-random", "hs-lr1e-3-random", "hs-lr2e-3-random"]
    assert [line.split(":")[0] for line in lines] == [*names, "", *names, "all 4, one after the other"]
    # learning rates do not change what a step takes
    assert captured.err.count("measuring ") == 2
    path.write_text(path.read_text().replace("lr: [1e-3, 2e-3]", "relation_weights: ['1,2,3', '3,2,1', '0,0,1']"))
    assert main(["--config", str(path), "--dry-run", "--steps", "7"]) == 0
    # what is weighed with 0 is not computed; `hs` has nothing of it, and is measured as often all the same
    assert capsys.readouterr().err.count("measuring ") == 4
    flags = shlex.split(lines[3])
    for part in ("--mapping=1:2", "--lr=2e-3", "--student=2x32", "--seed=3", str(tmp_path / "students" / names[3])):
        assert part in flags
    assert flags[flags.index("--steps") + 1] == "7"
    assert not (tmp_path / "students").exists()


def test_a_dry_run_sums_up_what_is_left_to_train(store: Path, tmp_path: Path, capsys: Any) -> None:
    path = sweep_file(
        tmp_path,
        store,
        "runs:\n  a: {method: mha, steps: 4}\n  b: {method: od, steps: 6}\n  c: {method: mlm, steps: 0}\n",
    )
    assert main([*expand(read_config(path), path, [])[2].flags]) == 0
    profile = tmp_path / "gpu.json"
    rates = {"forward_flops_per_second": 3e6, "training_flops_per_second": 2e6}
    profile.write_text(
        json.dumps({"format": "kdcache-profile", "name": "a GPU", "device": "cuda", "dtype": "bfloat16", **rates})
    )
    capsys.readouterr()
    priced = ["--profile", str(profile), "--price-per-hour", "3.6"]
    assert main(["--config", str(path), "--dry-run", "--json", *priced]) == 0
    found = json.loads(capsys.readouterr().out)
    plans = [run["plan"] for run in found["runs"]]
    assert plans[2] is None and [run["name"] for run in found["runs"]] == ["a", "b", "c"]
    for plan, steps in zip(plans, (4, 6), strict=False):
        assert plan["steps"] == steps and plan["tokens"] == pytest.approx(steps * 8 * 24, rel=0.8)
        # what is validated takes time, too
        assert plan["profile_seconds"] >= steps * plan["step_flops"] / 2e6
        assert plan["price"] == pytest.approx(plan["profile_seconds"] / 1000)
    total = found["total"]
    assert total["runs"] == 2
    for name, key in (
        ("seconds", "profile_seconds"),
        ("tokens", "tokens"),
        ("disk_bytes", "disk_bytes"),
        ("price", "price"),
    ):
        assert total[name] == pytest.approx(plans[0][key] + plans[1][key])
    assert total["memory_bytes"] == max(plan["memory_bytes"] for plan in plans[:2])
    assert main(["--config", str(path), "--dry-run", "--only", "a", *priced]) == 0
    told = capsys.readouterr().out
    assert told.startswith("a: kdtrain ") and "b: " not in told
    assert "all 1, one after the other: " in told and "(on a GPU in bfloat16, by the rates in " in told
    assert main(["--config", str(path), "--dry-run", "--profile", str(tmp_path / "no.json")]) == 1
    assert "is no profile of a device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, told",
    [
        ("runs: {a: {method: mha}, b: {methood: hs}}", "sets 'methood', which kdtrain does not know"),
        ("runs: {a: {method: mha}, b: {method: hx}}", "run 'b': --method 'hx' cannot be read"),
        ("runs: [mha, hs]", "'runs' is ['mha', 'hs'], where a mapping"),
        ("method: mha\ngrid: {seed: 1}", "grid 'seed' is '1', where a list"),
        ("method: mha\ngrid: {lr: [1.0, 1.0]}", "two runs are called 'lr1.0'"),
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


# of a run among others that can be: what is refused of its text, when all settings are made
MISSPELT = [
    ({"mapping": "unifrom+lsat"}, "--mapping 'unifrom+lsat' cannot be read at 'unifrom': did you mean uniform"),
    ({"mapping": "skip+last"}, "--mapping 'skip+last' adds skip to something else"),
    ({"student": "3xx384"}, "--student '3xx384' is neither a shape nor a folder that exists"),
    ({"student": "3x384:5"}, "--student '3x384:5': 5 attention heads do not divide the width 384"),
    ({"init": "teacherr"}, "--init 'teacherr' cannot be read, and there is no such folder: did you mean teacher:last"),
    ({"init": "teacher:1"}, "--init 'teacher:1' names 1 teacher layers for a student of 2"),
    ({"mapping": "3:4"}, "--mapping '3:4' names layer 3 of the student, which has layers 1 to 2"),
    ({"attention_layer": "lst"}, "--attention-layer 'lst' cannot be read at 'lst'"),
    ({"method": "mha", "attention_layer": "3:4"}, "--attention-layer '3:4' names layer 3 of the student"),
    ({"relation_heads": "0"}, "--relation-heads 0 cannot be: give a number of at least 1"),
    ({"weights": "1,2"}, "--weights '1,2' cannot be used: give 1 non-negative numbers"),
    ({"relation_weights": "1,2"}, "--relation-weights '1,2' cannot be used: give 3"),
    (
        {"mapping": "unifrom+lsat", "student": "3xx384", "init": "teacherr"},
        "is neither a shape nor a folder that exists",
    ),
]
# and what is refused when it is held against the cache, or this machine
UNFIT = [
    ({"mapping": "1:3"}, "lacks hidden 3"),
    ({"mapping": "1:9"}, "--mapping '1:9' names layer 9 of the teacher, which has layers 1 to 4"),
    ({"mapping": "emd"}, "`--layers all` names them"),
    ({"student": "9x32"}, "--student '9x32' has 9 layers, the teacher 4"),
    ({"init": "teacher:1,9"}, "--init 'teacher:1,9' names layer 9, the teacher has layers 1 to 4"),
    ({"student": "2x64", "init": "teacher:last"}, "a wider student than the teacher cannot be sliced from it"),
    ({"student": "2x64", "init": "embeddings"}, "the teacher's embeddings do not fit it"),
    ({"method": "mha", "attention_layer": "1"}, "--targets attention --attention-layer 1`"),
    ({"method": "mha", "attention_layer": "9"}, "--attention-layer '9' names layer 9 of the teacher"),
    ({"method": "mha", "relation_heads": "5"}, "--relation-heads 5 does not divide both the teacher's width 32"),
    ({"cache": "nothing.zarr"}, "no store at 'nothing.zarr'"),
    ({"valid_share": "0.999"}, "no row is left to train on"),
    ({"micro_batch_size": "3"}, "--micro-batch-size 3 does not divide --batch-size 8"),
    ({"dtype": "bfloat16"}, "--dtype 'bfloat16' on a CPU"),
    ({"deepspeed": "nothing.json"}, "--deepspeed 'nothing.json' cannot be read as JSON"),
]


def bad_among_good(wrong: dict[str, str]) -> str:
    bad = json.dumps({"method": "hs", "mapping": "1:2", **wrong})
    return f"steps: 1\nruns:\n  good: {{method: mha}}\n  bad: {bad}\n"


@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "sweep"])
@pytest.mark.parametrize("wrong, told", MISSPELT)
def test_a_misspelt_value_is_found_before_anything_is_opened(
    tmp_path: Path, capsys: Any, wrong: dict[str, str], told: str, dry: bool
) -> None:
    """There is no cache here: only the texts can have been looked at."""
    path = sweep_file(tmp_path, tmp_path / "no.zarr", bad_among_good(wrong))
    assert main(["--config", str(path), *(["--dry-run"] if dry else [])]) == 1
    captured = capsys.readouterr()
    assert f"{str(path)!r}, run 'bad': --" in captured.err and told in captured.err
    assert captured.out == "" and not (tmp_path / "students").exists()


@pytest.mark.parametrize("wrong, told", UNFIT)
def test_a_dry_run_holds_every_run_against_its_cache_in_the_words_of_a_single_run(
    store: Path, tmp_path: Path, capsys: Any, wrong: dict[str, str], told: str
) -> None:
    path = sweep_file(tmp_path, store, bad_among_good(wrong))
    assert main(["--config", str(path), "--dry-run"]) == 1
    captured = capsys.readouterr()
    prefix = f"kdtrain: {str(path)!r}, run 'bad': "
    assert captured.err.startswith(prefix) and told in captured.err
    assert captured.out == "" and not (tmp_path / "students").exists()
    single = expand(read_config(path), path, [])[1].flags
    assert main([*single]) == 1
    _, _, alone = capsys.readouterr().err.partition("kdtrain: ")
    assert alone == captured.err.removeprefix(prefix)


def test_a_dry_run_opens_each_cache_once_and_leaves_out_students_that_are_there(
    store: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, ...]] = []

    def noting(locations: tuple[str, ...], **options: Any) -> Any:
        opened.append(locations)
        return open_caches(locations, **options)

    monkeypatch.setattr("student_train.train.prepare.open_caches", noting)
    (tmp_path / "other.zarr").symlink_to(store)
    runs = "  a: {method: mha}\n  b: {method: od}\n  c: {method: mlm, cache: OTHER}\n"
    path = sweep_file(tmp_path, store, f"steps: 0\nruns:\n{runs}".replace("OTHER", str(tmp_path / "other.zarr")))
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert opened == [(str(store),), (str(tmp_path / "other.zarr"),)]
    assert main([*expand(read_config(path), path, [])[2].flags]) == 0
    capsys.readouterr()
    opened.clear()
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert opened == [(str(store),)]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize("typed", [True, False])
def test_students_are_not_written_to_an_address(store: Path, tmp_path: Path, capsys: Any, typed: bool) -> None:
    path, address = sweep_file(tmp_path, store, "method: mha\nsteps: 1\nruns: {a: {}}\n"), "s3://bucket/students"
    if not typed:
        lines = path.read_text().splitlines()
        path.write_text("\n".join(f"out: {address}" if line.startswith("out:") else line for line in lines))
    assert main(["--config", str(path), "--dry-run", *(["--out", address] if typed else [])]) == 1
    assert f"--out '{address}{'' if typed else '/a'}' is an address" in capsys.readouterr().err


def test_a_launcher_that_is_not_there_is_found_before_anything_is_trained(
    store: Path, tmp_path: Path, capsys: Any
) -> None:
    path = sweep_file(tmp_path, store, "method: mha\nsteps: 1\nlauncher: torchrunn --nproc 8\nruns: {a: {}}\n")
    assert main(["--config", str(path)]) == 1
    assert "launcher 'torchrunn --nproc 8' starts with 'torchrunn', which is no program" in capsys.readouterr().err
    assert not (tmp_path / "students").exists()


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
    end = tmp_path / "end"
    endless = ["sh", "-c", f"while ! test -e '{end}'; do sleep 0.1; done"]
    code = (
        f"import sys; from cli.sweep_process import start; print(start({endless!r}).pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            training = int(parent.stdout.readline())
            assert process_state(training) not in (None, "Z")
            parent.kill()
            parent.wait()
            while process_state(training) not in (None, "Z"):
                time.sleep(0.02)
        finally:
            end.touch()
            parent.kill()


def process_state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def test_one_process_of_several_is_refused(store: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", str(sweep_file(tmp_path, store, "steps: 1\nruns: {a: {method: mha}}\n"))]) == 1
    assert "launcher: torchrun" in capsys.readouterr().err


# a launcher whose training asks the sweep that started it to stop, once, when step 8 is written, and goes on when asked
# to stop itself
ASKING = """
import os, signal, sys, time
from pathlib import Path
from student_train.train.metrics import MetricsLog
from cli.kdtrain import main
from cli.options import read_config
from cli.sweep_file import expand
write, asked, sweep = MetricsLog.write, Path({asked!r}), {sweep}
def write_and_ask(log, record):
    write(log, record)
    if record["step"] == 8 and "loss" in record and not asked.exists():
        asked.touch()
        noted, told = signal.getsignal(signal.SIGTERM), []
        def tell(number, frame):
            told.append(number)
            noted(number, frame)
        signal.signal(signal.SIGTERM, tell)
        os.kill(sweep, signal.SIGTERM)
        while not told:
            time.sleep(0.01)
MetricsLog.write = write_and_ask
sys.exit(main(sys.argv[3:]))
"""


def test_a_stopped_sweep_goes_on_and_a_run_that_fails_does_not_stop_it(
    store: Path, warm: Warm, tmp_path: Path, capsys: Any
) -> None:
    steps, launcher, out = 12, tmp_path / "launcher.py", tmp_path / "students"
    launcher.write_text(ASKING.format(asked=str(tmp_path / "asked"), sweep=os.getpid()))
    runs = "  one: {method: mha}\n  impossible: {method: hs, mapping: '1:3'}\n  last: {method: mha, steps: 2}\n"
    text = f"steps: {steps}\nlauncher: {shlex.join([*warm.python, str(launcher)])}\nruns:\n{runs}"
    path = sweep_file(tmp_path, store, text)
    assert main(["--config", str(path), "--json"]) == 143
    captured = capsys.readouterr()
    assert {run["name"]: run["state"] for run in json.loads(captured.out)["runs"]} == {
        "one": "stopped", "impossible": "not started", "last": "not started",
    }  # fmt: skip
    assert "stopped; the same command goes on from here" in captured.err
    done = max(record["step"] for record in read_records(out / "one" / "metrics.jsonl"))
    assert 8 <= done < steps and not (out / "last").exists()

    assert main(["--config", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    found = {run["name"]: run for run in json.loads(captured.out)["runs"]}
    assert {name: run["state"] for name, run in found.items()} == {
        "one": "complete", "impossible": "failed (1)", "last": "complete",
    }  # fmt: skip
    assert found["one"]["steps"] == steps and found["last"]["differs"] == {"method": "mha", "steps": "2"}
    assert [record["step"] for record in read_records(out / "one" / "metrics.jsonl") if "loss" in record] == [
        *range(1, steps + 1)
    ]
    assert json.loads((out / "summary.json").read_text()) == json.loads(captured.out)
    assert "method hs, mapping 1:3" in (out / "summary.md").read_text()
    assert found["one"]["last"].keys() == {"step", "loss", "mha"} == found["one"]["best"].keys()
    assert found["one"]["last"]["step"] == steps and found["one"]["best"]["loss"] <= found["one"]["last"]["loss"]

    # other settings in a folder that holds a finished student
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    assert main(["--config", str(path)]) == 1
    assert "run 'one'" in (told := capsys.readouterr().err) and "--seed was 3 and is 4" in told
