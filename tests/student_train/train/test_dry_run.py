"""What a training would take, from its first steps: measured, said, and nothing written."""

import pytest

from student_train.settings import TrainSettings
from student_train.train.dry_run import dry_run
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from tests.student_train.train.trainings import HELD_OUT


def test_a_dry_run_saves_nothing_where_the_cache_fails(damaged_store, tmp_path):
    store, _ = damaged_store
    settings = {"method": "hs", "cache": (str(store),), "out": str(tmp_path / "student"), "batch_size": 96}
    with pytest.raises(StoreError, match="block 5"):
        dry_run(TrainSettings(**settings, valid_share=HELD_OUT / 101, device="cpu"))
    assert not (tmp_path / "student").exists()


def test_an_estimate_of_a_training(tiny_store, tmp_path, capsys, monkeypatch):
    """Numbers that can be counted are; those that were measured are of the right kind."""
    out = tmp_path / "student"
    settings = {"method": "mha+od", "cache": (str(tiny_store),), "out": str(out), "steps": 40, "batch_size": 16}
    found = dry_run(TrainSettings(**settings, valid_share=HELD_OUT / 101, valid_every=20, device="cpu"))
    assert not out.exists()
    assert capsys.readouterr().err.splitlines()[0].startswith("cache    ")
    layer = 4 * 33 * 32 + 33 * 64 + 65 * 32 + 4 * 32
    head = 33 * 32 + 2 * 32 + 200
    assert found.parameters == (200 + 64 + 2) * 32 + 2 * 32 + 2 * layer + head
    assert found.steps == 40 and 0 < found.trained_parameters <= found.parameters
    assert found.checkpoint_bytes == 2 * 12 * found.trained_parameters
    assert found.step_seconds > 0 and 0 <= found.wait_share <= 1
    # four validations of 5 rows, each row a third of what it costs in training
    steps = 40 + 4 * HELD_OUT / 16 / 3
    assert found.training_seconds == pytest.approx(found.step_seconds * steps)
    # each step reads 16 rows of 6 to 24 tokens
    assert 16 * 6 < found.tokens_per_second * found.step_seconds <= 16 * 24
    assert found.memory_bytes > 50_000_000
    # 40 steps of 16 of the 96 training rows, four validations of 5 of all 101, as the reader really opens files
    reader, request = CacheReader.open(tiny_store), TargetRequest(attention_layers=(3,), logits=True)
    opened: list[str] = []
    with monkeypatch.context() as patched:
        real = reader._objects.shard
        patched.setattr(reader._objects, "shard", lambda path, block: opened.append(path) or real(path, block))
        reader.read_rows(0, reader.rows, request)
    sizes = describe_store(tiny_store).bytes_per_array
    passes = 40 * 16 / (101 - HELD_OUT) + 4 * HELD_OUT / 101
    assert found.read_objects == round(passes * len(opened))
    blocks = reader.manifest.blocks
    assert found.read_bytes == round(passes * sum(sizes[path] for path in opened) / blocks)
    assert found.to_json()["steps"] == 40
