"""What a training would take, from its first steps: measured, said, and nothing written."""

import pytest

from student_train.data.loader import CacheLoader
from student_train.settings import TrainSettings
from student_train.train.dry_run import dry_run
from student_train.train.prepare import prepare_run
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.read.info import describe_store
from teacher_cache.read.load import BlockLoader
from teacher_cache.read.reader import CacheReader
from tests.student_train.train.trainings import HELD_OUT


def test_a_dry_run_saves_nothing_where_the_cache_fails(damaged_store, tmp_path):
    store, _ = damaged_store
    settings = {"method": "hs", "cache": (str(store),), "out": str(tmp_path / "student"), "batch_size": 96}
    with pytest.raises(StoreError, match="block 5"):
        dry_run(TrainSettings(**settings, valid_share=HELD_OUT / 101, device="cpu"))
    assert not (tmp_path / "student").exists()


def test_an_estimate_of_a_training(tiny_store, tmp_path, capsys):
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
    # validations of 5 rows before, in the middle and after, each row a third of what it costs in training
    steps = 40 + 3 * HELD_OUT / 16 / 3
    assert found.training_seconds == pytest.approx(found.step_seconds * steps)
    # each step reads 16 rows of 6 to 24 tokens
    assert 16 * 6 < found.tokens_per_second * found.step_seconds <= 16 * 24
    assert found.memory_bytes > 50_000_000
    assert found.to_json()["steps"] == 40


@pytest.mark.parametrize("held_out", [HELD_OUT, 50])
def test_objects_are_those_that_a_training_reads(held_out, tiny_store, tmp_path, monkeypatch):
    """Two epochs, and a validation before, between and after them: what the loaders really ask for, array by array."""
    epoch = (101 - held_out) // 3
    settings = {
        "method": "mha+od", "cache": (str(tiny_store),), "batch_size": 3, "steps": 2 * epoch, "valid_every": epoch,
        "valid_share": held_out / 101, "device": "cpu", "out": str(tmp_path / "student"),
    }  # fmt: skip
    found = dry_run(TrainSettings(**settings), quiet=True)
    read: list[tuple[str, int]] = []
    load, making = BlockLoader.load_array, {"loader": False}

    def count(self, path, block, part=None):
        if making["loader"]:
            read.append((path, block))
        return load(self, path, block, part)

    monkeypatch.setattr(BlockLoader, "load_array", count)
    run = prepare_run(TrainSettings(**settings))
    making["loader"] = True
    for rows, stop in ((run.training_rows, 2 * 3 * epoch), *3 * [(run.held_out_rows, held_out)]):
        loader = CacheLoader(
            run.source, run.objective.request, rows=rows, batch_size=3, seed=0, stop=stop, device="cpu"
        )
        assert sum(len(view.row_id_B) for batch in loader for view in list(batch.views.values())[:1]) == stop
    sizes, blocks = describe_store(tiny_store).bytes_per_array, run.reader.block_bounds
    assert found.read_objects == pytest.approx(len(read), rel=0.05)
    assert found.read_bytes == pytest.approx(sum(sizes[path] for path, _ in read) / (len(blocks) - 1), rel=0.05)


def test_a_seal_that_lacks_an_array_is_a_message(tiny_store):
    reader = CacheReader.open(tiny_store)
    reader._groups[0].seal.bytes_per_array.pop("length")
    with pytest.raises(StoreError, match="no seal says how large 'length' is"):
        reader.shards_read(TargetRequest(logits=True))
