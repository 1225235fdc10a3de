"""Metrics on Weights & Biases: what is sent, and what happens where nothing can be sent."""

import sys
import time

import pytest

from student_train.run_files import read_records
from student_train.train.metrics import MetricsLog
from student_train.train.weights_and_biases import WeightsAndBiases, _run_number, check_installed, curve_name
from teacher_cache.errors import SettingsError, TrainingError


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
    names = (b"train/loss", b"train/mha", b"valid/loss", b"students")
    # a process of its own writes, and may be a moment late
    deadline = time.monotonic() + 60
    while not all(name in file.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in names:
        assert name in file.read_bytes()
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 1]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--wandb 'students'.*pip install 'kdcache\[wandb\]'"):
        check_installed("students")


def test_the_file_of_numbers_makes_a_resumed_run_the_same_one(tmp_path):
    file = tmp_path / "wandb" / "run-number"
    first = _run_number(file, resumed=False)
    assert len(first) == 16 and _run_number(file, resumed=True) == first
    # a fresh training is another run there, even in the same folder
    assert _run_number(file, resumed=False) != first
    # a run that was begun without --wandb has none yet
    assert len(_run_number(tmp_path / "other" / "run-number", resumed=True)) == 16


class Service:
    """In the place of the package: remembers what it gets, and fails when told to."""

    Settings = dict

    def __init__(self):
        self.sent, self.failure = [], None

    def init(self, **options):
        self.options = options
        if self.failure is not None:
            raise self.failure
        return self

    def log(self, values, step):
        if self.failure is not None:
            raise self.failure
        self.sent.append((step, values))

    def finish(self):
        self.log("finish", None)


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def test_what_is_sent(service, tmp_path):
    run = WeightsAndBiases("students", tmp_path, {"--lr": 0.25}, resumed=False)
    assert (service.options["project"], service.options["name"]) == ("students", tmp_path.name)
    assert service.options["config"] == {"--lr": 0.25} and service.options["resume"] == "allow"
    run.write({"step": 3, "loss": 0.5, "valid_mha": 0.25})
    run.close()
    assert service.sent == [(3, {"train/loss": 0.5, "valid/mha": 0.25}), (None, "finish")]


def test_a_service_that_refuses_ends_the_training_before_it_starts(service, tmp_path):
    service.failure = OSError("no login")
    with pytest.raises(TrainingError, match=r"'students' cannot be written to \(no login\).*WANDB_MODE=offline"):
        WeightsAndBiases("students", tmp_path, {}, resumed=False)


def test_a_service_that_fails_later_does_not_end_the_training(service, tmp_path, caplog):
    run = WeightsAndBiases("students", tmp_path, {}, resumed=False)
    run.write({"step": 1, "loss": 0.5})
    service.failure = OSError("connection lost")
    run.write({"step": 2, "loss": 0.5})
    service.failure = None
    run.write({"step": 3, "loss": 0.5})
    run.close()
    # said once, and nothing is sent any more: curves with holes would mislead
    assert [step for step, _ in service.sent] == [1]
    assert [record.message for record in caplog.records] == [
        "Weights & Biases gets no more metrics (connection lost); metrics.jsonl does"
    ]


def test_curves():
    assert [curve_name(name) for name in ("valid_loss", "loss", "lr")] == ["valid/loss", "train/loss", "train/lr"]
