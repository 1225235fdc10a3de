"""The file of a sweep: which trainings it asks for, by which names and with which flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.options import read_config
from cli.sweep_file import SweepRun, expand
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError


def runs_of(folder: Path, text: str, *typed: str) -> list[SweepRun]:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return expand(read_config(path), path, typed)


def test_runs_are_taken_with_every_combination_of_the_grid(tmp_path: Path) -> None:
    text = "out: there\nsteps: 3\nruns: {mha: {method: mha}, hs: {method: hs, lr: 1}}\n"
    found = runs_of(tmp_path, text + "grid: {student: [2x32, 3x32], seed: [0, 1]}\n")
    assert [run.name for run in found] == [
        f"{name}-{student}-seed{seed}" for name in ("mha", "hs") for student in ("2x32", "3x32") for seed in (0, 1)
    ]
    last = found[-1]
    assert (last.settings.method, last.settings.lr, last.settings.student, last.settings.seed) == ("hs", 1, "3x32", 1)
    assert last.settings.steps == 3 and last.settings.out == "there/hs-3x32-seed1"
    assert last.differs == {"method": "hs", "lr": "1", "student": "3x32", "seed": "1"}
    assert list(last.flags[-2:]) == ["--out", "there/hs-3x32-seed1"]


def test_a_grid_alone_varies_the_common_flags(tmp_path: Path) -> None:
    found = runs_of(tmp_path, "method: mha\ngrid: {init: [auto, random], dropout: [0, 0.1]}\n")
    assert [run.name for run in found] == ["auto-dropout0", "auto-dropout0.1", "random-dropout0", "random-dropout0.1"]
    assert {run.settings.out for run in found} == {f"students/{run.name}" for run in found}


def test_what_is_left_empty_is_left_out(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, "out:\ncache:\nmethod: mha\nruns: {a: }\n")
    assert run.settings == TrainSettings(method="mha", out="students/a")


def test_what_is_typed_takes_the_place_of_what_is_written(tmp_path: Path) -> None:
    """Flags of several values may come but once, and a name must not tell another value than the run has."""
    text = "cache: file.zarr\nmethod: mha\nsteps: 1\n"
    first, second = runs_of(tmp_path, text + "grid: {cache: [a.zarr, [b.zarr, c.zarr]]}\n")
    assert first.settings.cache == ("a.zarr",) and second.settings.cache == ("b.zarr", "c.zarr")
    assert "file.zarr" not in first.flags
    text += "grid: {lr: [1, 2]}\n"
    first, _ = runs_of(tmp_path, text, "--cache", "d.zarr", "--out", "elsewhere")
    assert first.settings.cache == ("d.zarr",)
    assert list(first.flags[-6:]) == ["--cache", "d.zarr", "--out", "elsewhere", "--out", "elsewhere/lr1"]
    with pytest.raises(SettingsError, match="--lr is typed and the grid varies it"):
        runs_of(tmp_path, text, "--lr", "3")


def test_a_typed_value_that_is_spelt_like_a_flag_is_no_flag(tmp_path: Path) -> None:
    text = "student: 2x32\nmethod: mha\nruns: {a: {lr: 1}, b: {lr: 2}}\n"
    found = runs_of(tmp_path, text, "--out", "student", "--local-cache", "lr")
    assert [(run.settings.student, run.settings.lr) for run in found] == [("2x32", 1), ("2x32", 2)]


@pytest.mark.parametrize(
    "text, told",
    [
        ("runs: [mha, hs]", "'runs' is \\['mha', 'hs'\\], where a mapping"),
        ("runs: {}", "'runs' is {}, where a mapping"),
        ("runs: {a: mha}", "run 'a' is 'mha', where flags are expected"),
        ("runs: {summary.json: {method: mha}}", "a run cannot be called 'summary.json'"),
        ("runs: {-a: {method: mha}}", "a run cannot be called '-a'"),
        ("runs: {a: {method: mha, out: b}}", "run 'a' sets 'out', which is of the whole sweep"),
        ("method: mha\ngrid: [1]", "'grid' is \\['1'\\], where a mapping"),
        ("method: mha\ngrid: {seed: []}", "grid 'seed' is \\[\\], where a list of values"),
        ("method: mha\ngrid: {resume: [auto, never]}", "the grid sets 'resume', which is of the whole sweep"),
        ("method: mha\ngrid: {init: [a/b, a_b]}", "run 'a_b': --init 'a/b' cannot be read"),
        ("method: mha\ngrid: {lr: [1.0, 1.0]}", "two runs are called 'lr1.0'"),
        ("method: mha\nruns: {a: {}, b: {init: auto}}", "runs 'a' and 'b' have the same settings"),
        ("method: mha\ngrid: {seed: 1}", "grid 'seed' is '1', where a list of values"),
        ("runs: {a: {method: mha}}\nout: [a, b]", "the field 'out' is .*: it must be text; give one line"),
        ("runs: {a: {method: mha}}\nlauncher: {a: b}", "the field 'launcher' is .*: it must be text"),
        ('runs: {a: {method: mha}}\nlauncher: "\'torchrun"', "the field 'launcher' is .*: No closing quotation"),
        ("runs: {a: {method: mha, batch-size: 2, batch_size: 4}}", "'batch_size' is given twice, with - and with _"),
        ("runs: {a: {method: mha}, b: {method: hs, mapping: lsat}}", "run 'b': --mapping 'lsat' .*did you mean last"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        runs_of(tmp_path, text + "\n")


@pytest.mark.parametrize("text", ["runs: {a: {methood: mha}}", "runs: {a: {method: mha, seed: x}}", "runs: {a: {}}"])
def test_wrong_usage_names_the_run(tmp_path: Path, capsys: Any, text: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        runs_of(tmp_path, text + "\n")
    assert leaving.value.code == 2 and "run 'a' of" in capsys.readouterr().err


def test_a_grid_of_more_trainings_than_there_is_time_for_is_refused() -> None:
    grid = {flag: [str(value) for value in range(100)] for flag in ("seed", "lr", "batch_size", "warmup", "steps")}
    with pytest.raises(SettingsError, match="ask for 10000000000 trainings"):
        expand({"grid": grid}, Path("sweep.yaml"), [])
