import json
import re
import sys

from student_train.provenance import run_provenance, software_versions


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
    assert {"deepspeed", "transformers", "zarr", "python"} <= versions.keys()
