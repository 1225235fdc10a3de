"""Trainings of 12 steps that several tests look at, each made once."""

import shutil
from pathlib import Path

import pytest

from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.train.train import train
from tests.student_train.train.trainings import BATCH, HELD_OUT, LR, STEPS, damage_block


@pytest.fixture(scope="session")
def run_training(tiny_store):
    """`run_training(out, **settings)`: a training of 12 steps on 96 rows, 5 held out; returns its records."""

    def run(out, **options):
        settings = {
            "method": "mha+hs+od",
            "weights": "1,0.1,2",
            "cache": (str(tiny_store),),
            "out": str(out),
            "steps": STEPS,
            "batch_size": BATCH,
            "lr": LR,
            "warmup": 3,
            "valid_share": HELD_OUT / 101,
            "valid_every": 5,
            "save_every": 4,
            "device": "cpu",
        } | options
        result = train(TrainSettings(**settings))
        assert result.stopped_by is None
        return read_records(Path(out) / "metrics.jsonl")

    return run


@pytest.fixture(scope="session")
def finished(run_training, tmp_path_factory):
    """A finished run: its directory and records."""
    out = tmp_path_factory.mktemp("finished") / "student"
    return out, run_training(out)


@pytest.fixture
def interrupted(finished, tmp_path):
    """The finished run as it was when step 11 was recorded, with the checkpoints of steps 8 and 12, and no student."""
    out = tmp_path / "student"
    shutil.copytree(finished[0], out)
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (out / name).unlink()
    return out


@pytest.fixture
def damaged_store(tiny_store, tmp_path):
    """A copy of the store with one block damaged, and how to mend it."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    return store, damage_block(store, 5)
