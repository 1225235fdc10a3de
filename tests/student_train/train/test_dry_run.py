"""What a training would take, from its first steps: measured, said, and nothing written."""

import pytest

from student_train.settings import TrainSettings
from student_train.train.dry_run import dry_run
from teacher_cache.errors import StoreError
from tests.student_train.train.trainings import HELD_OUT


def test_a_dry_run_saves_nothing_where_the_cache_fails(damaged_store, tmp_path):
    store, _ = damaged_store
    settings = {"method": "hs", "cache": (str(store),), "out": str(tmp_path / "student"), "batch_size": 96}
    with pytest.raises(StoreError, match="block 5"):
        dry_run(TrainSettings(**settings, valid_share=HELD_OUT / 101, device="cpu"))
    assert not (tmp_path / "student").exists()
