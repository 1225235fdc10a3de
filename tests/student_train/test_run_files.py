import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest

import student_train.run_files
from student_train.run_files import read_curves, read_records, run_provenance, software_versions
from teacher_cache.errors import TrainingError


def test_a_record_says_what_ran_and_turns_into_json(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kdtrain", "--method", "hs", "--out", "a b"])
    record = json.loads(json.dumps(run_provenance()))
    assert record["command"] == "kdtrain --method hs --out 'a b'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["created"])
    assert record["git_revision"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["git_revision"])


def test_versions_are_those_installed():
    import torch

    versions = software_versions()
    assert versions["torch"] == torch.__version__
    assert {"kdcache", "deepspeed", "transformers", "zarr", "python"} <= versions.keys()


def test_the_revision_of_a_foreign_working_copy_is_none_of_ours(tmp_path):
    """As where a package is installed inside a project's folder: untracked there, then tracked."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "theirs")
    shutil.copy(student_train.run_files.__file__, tmp_path / "copied.py")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.git_revision() is None
    git("add", "copied.py")
    git("commit", "--quiet", "--message", "ours")
    assert copied.git_revision() == git("rev-parse", "HEAD")


STEP = {"step": 1, "loss": 2.5, "mha": 0.5, "grad_norm": None, "lr": 0.1, "tokens": 90, "seconds": 0.5, "wait": 0}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"step": True}, "the field 'step' is True: it must be a whole number"),
        ({"step": -1}, "the field 'step' is -1"),
        ({"loss": None}, "the field 'loss' is None: it must be a number"),
        ({"loss": "2.5"}, "the field 'loss' is '2.5'"),
        ({"mha": [1]}, r"the field 'mha' is \[1\]: it must be a number"),
        ({"tokens": 1.5}, "the field 'tokens' is 1.5: it must be a whole number"),
        ({"seconds": -0.5}, "the field 'seconds' is -0.5: it must be a number of at least 0"),
        ({"loss": 1e300}, "the field 'loss' is 1e.300: it must be a number of at most"),
    ],
)
def test_a_line_of_metrics_that_cannot_be_is_named(tmp_path, change, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(STEP) + "\n")
    assert read_curves(path) == read_records(path) == [STEP]
    path.write_text(f"{json.dumps(STEP)}\n{json.dumps({**STEP, **change})}\n")
    for read in (read_records, read_curves):
        with pytest.raises(TrainingError, match=f"metrics.jsonl' cannot be read .*{said}"):
            read(path)


def test_curves_need_more_of_a_line_than_a_resumed_run_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for record, lacking in (({"step": 1, "loss": 1.0}, "lr"), ({"step": 0}, "valid_loss")):
        path.write_text(json.dumps(record) + "\n")
        assert read_records(path) == [record]
        with pytest.raises(TrainingError, match=f"line 1: the field '{lacking}' is missing.*leave the curves out"):
            read_curves(path)
