"""Metrics on Weights & Biases: what is sent, and what happens where nothing can be sent."""

import pytest

from student_train.run_files import read_records
from student_train.train.metrics import MetricsLog
from student_train.train.weights_and_biases import WeightsAndBiases, check_installed
from teacher_cache.errors import SettingsError


def test_records_also_go_to_weights_and_biases(tmp_path, monkeypatch):
    """The package itself, told to keep on disk what it would send."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "student"
    out.mkdir()
    log = MetricsLog(out, last_step=None)
    log.also_to(WeightsAndBiases("students", out, {"--lr": 0.25}, resumed=False))
    log.write({"step": 1, "loss": 0.5, "mha": 0.5})
    log.write({"step": 1, "valid_loss": 0.125})
    log.close()
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for name in (b"train/loss", b"train/mha", b"valid/loss", b"students"):
        assert name in written
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 1]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--wandb 'students'.*pip install 'kdcache\[wandb\]'"):
        check_installed("students")
