"""Steps: what a batch teaches however it is cut into passes, what is recorded of it, and what stops a run."""

import json
import math

import pytest
import torch
from transformers import AutoModel

from student_train.data.order import RowOrder
from student_train.engine.checkpoint import checkpoint_path, newest_checkpoint
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.train.loop import Progression, StepOutcome, Trainer
from student_train.train.metrics import MetricsLog, Progress
from student_train.train.prepare import prepare_run
from teacher_cache.errors import StoreError, TrainingError
from teacher_cache.read.reader import CacheReader
from tests.student_train.train.trainings import HELD_OUT, make_model, read_batch, steps_of, validations_of


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_accumulation_does_not_change_the_training(run_training, finished, tmp_path, micro_batch):
    """Micro-batches hold different numbers of real positions: a mean of means would differ."""
    records = run_training(tmp_path / "student", micro_batch_size=micro_batch, save_every=100)
    for ours, theirs in zip(steps_of(records), steps_of(finished[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(validations_of(records), validations_of(finished[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_tokens_are_the_real_ones_seen_so_far(finished, tiny_store):
    reader = CacheReader.open(tiny_store)
    order = RowOrder(rows=(range(reader.rows - HELD_OUT),), bounds=reader.block_bounds, seed=0)
    _, _, objective = make_model(tiny_store)
    seen = 0
    for number, record in enumerate(steps_of(finished[1])):
        seen += int(read_batch(reader, objective.request, order, number)["plain"].length_B.sum())
        assert record["tokens"] == seen


@pytest.mark.parametrize("mapping", ["skip", "emd", "alp"])
def test_passes_do_not_change_what_a_mapping_teaches(run_training, tmp_path, mapping):
    """Rows are counted over the batch, and a flow comes from the costs of the whole step before."""
    options = {"method": "hs", "weights": None, "mapping": mapping, "steps": 4, "valid_every": 4, "save_every": 100}
    whole, parts = (run_training(tmp_path / str(size), micro_batch_size=size, **options) for size in (16, 4))
    for ours, theirs in zip(steps_of(parts), steps_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert validations_of(parts)[-1] == pytest.approx(validations_of(whole)[-1], rel=1e-4)
    described = json.loads((tmp_path / "16" / "provenance.json").read_text())
    assert described["objective"]["hs"]["mapping"] == described["settings"]["mapping"] == mapping
    assert bool(described["adapted"]) == (mapping == "emd")
    assert not [name for name in AutoModel.from_pretrained(tmp_path / "16").state_dict() if "projection" in name]


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(run_training, tiny_store, tmp_path):
    with pytest.raises(TrainingError, match="(loss|gradient) of step") as caught:
        run_training(tmp_path / "student", lr=1e30, clip=0.0, save_every=1)
    records = steps_of(read_records(tmp_path / "student" / "metrics.jsonl"))
    failed = len(records) + 1
    assert f"step {failed} " in str(caught.value)
    assert all(math.isfinite(record["loss"]) for record in records)
    assert not (tmp_path / "student" / "model.safetensors").exists()
    newest = newest_checkpoint(tmp_path / "student")
    assert newest is None or newest == checkpoint_path(tmp_path / "student", failed - 1)
    reader, _, objective = make_model(tiny_store)
    order = RowOrder(rows=(range(reader.rows - HELD_OUT),), bounds=reader.block_bounds, seed=0)
    rows = read_batch(reader, objective.request, order, failed - 1)["plain"].row_id_B.tolist()
    assert str(rows) in str(caught.value)


def test_a_last_step_that_diverges_is_no_success(run_training, tmp_path):
    out = tmp_path / "student"
    with pytest.raises(TrainingError, match="validation loss after step 1 is not a finite number.*neither saved"):
        run_training(out, steps=1, lr=1e30, warmup=1, save_every=1)
    assert newest_checkpoint(out) is None
    assert not (out / "model.safetensors").exists()
    assert [record["step"] for record in validations_of(read_records(out / "metrics.jsonl"))] == [0]


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stops_the_run(tiny_store, tmp_path, norm):
    run = prepare_run(TrainSettings(method="hs", cache=(str(tiny_store),), out=str(tmp_path), steps=2, device="cpu"))
    trainer = Trainer(run, None, Progression(), MetricsLog(tmp_path, last_step=None), Progress())
    trainer._pending = StepOutcome(
        step=1,
        losses={"hs": torch.tensor(0.5)},
        gradient_norm=torch.tensor(norm),
        scaled_away=False,
        record={"wait": 0.0},
        tokens=1,
        row_ids=(7,),
        blocks=(3,),
    )
    with pytest.raises(
        TrainingError, match=rf"gradient of step 1 .*hs 0\.5, gradient norm {norm}.* ids \[7\] of block 3 "
    ):
        trainer.save()
    assert list(tmp_path.glob("checkpoints/*")) == [] == read_records(tmp_path / "metrics.jsonl")


def test_a_damaged_block_stops_the_run_with_a_checkpoint_and_a_mended_one_goes_on(
    run_training, finished, damaged_store, tmp_path
):
    (store, mend), out = damaged_store, tmp_path / "student"
    with pytest.raises(StoreError, match=r"block 5 of .*damaged[^$]*\d+ steps are saved in .*--resume auto"):
        run_training(out, cache=(str(store),), save_every=100)
    done = steps_of(read_records(out / "metrics.jsonl"))
    assert newest_checkpoint(out) == checkpoint_path(out, len(done))
    assert not (out / "model.safetensors").exists()
    mend()
    records = run_training(out, cache=(str(store),), save_every=100, resume="auto")
    assert len(done) > 0 and steps_of(records) == steps_of(finished[1])
