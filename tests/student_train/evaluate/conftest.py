"""Directories of runs: with records alone, written by hand, and a real student with the records of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.settings import TrainSettings
from student_train.train.train import train
from tests.student_train.evaluate.left_records import finetuned, write


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """`make_run(name, seed=0, scores=[...], **settings)`: a directory with records of a training and no weights."""

    def make(name: str, *, scores: list[float] | None = None, contents: str = "c", **settings: Any) -> Path:
        run = tmp_path / name
        run.mkdir()
        given = {"method": "mha", "cache": ["cache.zarr"], "out": name, "seed": 0, "steps": 10, "init": "auto"}
        cache = {"path": "cache.zarr", "identity_sha256": contents}
        write(run / "provenance.json", {"settings": {**given, **settings}, "cache": cache, "steps": 10})
        if scores is not None:
            finetuned(run, "sst2", scores)
        return run

    return make


@pytest.fixture(scope="session")
def trained_run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of six steps, with a record of its fidelity."""
    out = tmp_path_factory.mktemp("run") / "<student> & co"
    train(
        TrainSettings(
            method="mha+hs", weights="1,0.1", cache=(str(tiny_store),), student="2x16:2", out=str(out), steps=6,
            valid_every=2, valid_share=0.1, device="cpu",
        )
    )  # fmt: skip
    report = measure_fidelity(str(out), [str(tiny_store)])
    record = {"evaluation": "fidelity", **report.to_json(), "command": "kdeval fidelity --student 'it' --json"}
    (out / "fidelity.json").write_text(json.dumps(record))
    return out
