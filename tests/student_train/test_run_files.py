import importlib.util
import json
import re
import shutil
import subprocess
import sys

import student_train.run_files
from student_train.run_files import run_provenance, software_versions


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
