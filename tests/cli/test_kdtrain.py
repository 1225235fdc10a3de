"""The command as a user runs it: real processes, real signals, exit codes and streams."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cli.kdtrain import main
from student_train.run_files import read_records
from student_train.train.loop import Trainer
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from tests.records import without_times

STEPS = 40


@pytest.fixture(scope="module")
def workplace(tiny_teacher, tiny_corpus, tmp_path_factory):
    """A folder with a store under its default name, as `kdcache build` leaves it."""
    folder = tmp_path_factory.mktemp("workplace")
    settings = BuildSettings(
        teacher=str(tiny_teacher("bert")),
        corpus=(str(tiny_corpus),),
        out=str(folder / "cache.zarr"),
        seq_len=24,
        max_rows=64,
        block_rows=8,
        rows="document",
        layers="all",
        device="cpu",
    )
    build_cache(settings)
    return folder


def flags(workplace, out, *more):
    fixed = ["--cache", str(workplace / "cache.zarr"), "--out", str(out), "--method", "mha+od", "--steps", str(STEPS)]
    return [*fixed, "--batch-size", "8", "--save-every", "6", "--valid-every", "16", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    """Records of the run that the others must equal."""
    assert main(flags(workplace, workplace / "whole")) == 0
    return read_records(workplace / "whole" / "metrics.jsonl")


# the command, which gets a signal once the record of step 8 is written
SIGNALLED = """
import os, sys
from cli.kdtrain import main
from student_train.train.metrics import MetricsLog
write = MetricsLog.write
def write_and_signal(log, record):
    write(log, record)
    if record["step"] == 8 and "loss" in record:
        os.kill(os.getpid(), number)
MetricsLog.write = write_and_signal
number = int(sys.argv.pop(1))
sys.exit(main())
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(workplace, uninterrupted, warm, number, code, capsys):
    out = workplace / f"stopped-{number.name}"
    command = [*warm.python, "-c", SIGNALLED, str(int(number)), *flags(workplace, out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    output = process.stdout
    assert process.returncode == code, process.stderr
    stopped_at = max(record["step"] for record in read_records(out / "metrics.jsonl"))
    assert 8 <= stopped_at < STEPS
    assert not (out / "model.safetensors").exists()
    saved = max(path.name for path in (out / "checkpoints").iterdir() if (path / "complete.json").exists())
    if number == signal.SIGTERM:
        assert saved == f"step-{stopped_at:08d}"
        assert "--resume auto" in output
    else:
        assert output == ""

    assert main(flags(workplace, out)) == 1
    assert "--resume auto" in capsys.readouterr().err
    assert main(flags(workplace, out, "--resume", "auto")) == 0
    assert without_times(read_records(out / "metrics.jsonl")) == without_times(uninterrupted)
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (out, workplace / "whole"))
    assert ours == theirs


def test_ctrl_c_saves_and_exits_with_130(workplace, monkeypatch):
    """In this process, which starts nothing: the signal comes while a step is under way."""
    out, backward = workplace / "ctrl-c", Trainer.backward

    def interrupted_backward(trainer, share):
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(trainer, share)

    monkeypatch.setattr(Trainer, "backward", interrupted_backward)
    assert main(flags(workplace, out)) == 130
    assert list((out / "checkpoints").glob("*/complete.json"))
    # handlers are back: the next Ctrl-C is Python's own
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_works_with_the_flags_of_the_readme_alone(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(["--method", "hs", "--mapping", "uniform+last", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["out"] == "student"
    assert result["steps"] == 6  # 3 epochs of 63 rows in batches of 32
    assert result["valid"].keys() == {"valid_loss", "valid_hs"}
    assert (workplace / "student" / "model.safetensors").exists()
    for told in (
        "cache.zarr: 64 rows of 24 tokens",
        "63 to train on, the last 1 held out",
        "pairs 1<-2 1<-3 2<-4",
        "layers 2, 4",
    ):
        assert told in captured.err


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (["--method", "hs", "--cache", "nothing.zarr"], 1, "no store at 'nothing.zarr'"),
        (["--method", "hx"], 1, "--method 'hx' cannot be read"),
        (["--method", "hs", "--mapping", "1:7"], 1, "--mapping '1:7'"),
        (["--method", "mha", "--attention-layer", "1"], 1, "--targets attention --attention-layer 1`"),
        (
            ["--method", "mha", "--attention-layer", "9"],
            1,
            "--attention-layer '9' names layer 9 of the teacher, which has layers 1 to 4",
        ),
        (["--method", "hs", "--dtype", "bfloat16", "--device", "cpu"], 1, "--dtype 'bfloat16' on a CPU"),
        (["--method", "hs", "--seed", str(2**63)], 1, f"--seed {2**63}"),
        (["--method", "mha", "--relation-heads", "5"], 1, "--relation-heads 5 does not divide"),
        (["--method", "hs", "--student", "9x32"], 1, "--student '9x32' has 9 layers, the teacher 4"),
        (["--method", "hs", "--seed", "x"], 2, "--seed"),
        (["--no-such-flag"], 2, "--no-such-flag"),
        ([], 2, "--method"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_written(workplace, monkeypatch, capsys, arguments, code, told):
    monkeypatch.chdir(workplace)
    arguments = [*arguments, "--out", "refused"]
    try:
        returned = main(arguments)
    except SystemExit as leaving:
        returned = leaving.code
    captured = capsys.readouterr()
    assert (returned, captured.out) == (code, "")
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert not (workplace / "refused").exists()


HELP = """
import sys
from cli.kdtrain import main
try:
    main(["--help"])
finally:
    sys.exit("torch" in sys.modules)
"""


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--micro-batch-size" in done.stdout


def test_what_deepspeed_prints_is_no_result(workplace, capsys):
    file = workplace / "profiler.json"
    file.write_text(json.dumps({"flops_profiler": {"enabled": True, "profile_step": 1}}))
    assert main(flags(workplace, workplace / "profiled", "--steps", "2", "--json", "--deepspeed", str(file))) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 2
    assert "Flops Profiler" in captured.err


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(workplace, tmp_path, capsys):
    out = tmp_path / "student"
    arguments = flags(workplace, out)
    assert main([*arguments, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["steps"] == 40 and 0 < found["trained_parameters"] <= found["parameters"] + 10_000
    # the whole is its steps and, at a third of their cost a row, the validations
    assert 40 * found["step_seconds"] <= found["training_seconds"] < 80 * found["step_seconds"]
    assert 0 <= found["wait_share"] < 1 and found["memory_bytes"] > 1e8 and found["tokens_per_second"] > 0
    assert "student  bert" in printed.err and not out.exists()
    assert main([*arguments, "--dry-run"]) == 0
    assert "40 steps would take " in capsys.readouterr().out


def test_a_config_from_a_pipe_is_read_once(workplace, capsys):
    """As `--config <(...)` gives it: whoever reads it again finds nothing."""
    reading, writing = os.pipe()
    os.write(writing, f"method: mha\ncache: {workplace / 'cache.zarr'}\nsteps: 7\ndevice: cpu\n".encode())
    os.close(writing)
    try:
        assert main(["--config", f"/dev/fd/{reading}", "--dry-run", "--json"]) == 0
    finally:
        os.close(reading)
    assert json.loads(capsys.readouterr().out)["steps"] == 7
