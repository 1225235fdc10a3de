"""Losses on held-out rows: means over all that can be read, however they are cut into batches."""

import shutil

import pytest
import torch

from student_train.settings import TrainSettings
from student_train.train.prepare import prepare_run
from teacher_cache.errors import StoreError, TrainingError
from tests.student_train.train.trainings import HELD_OUT, damage_block, make_model, steps_of, validations_of


def test_validation_is_the_mean_over_all_held_out_positions(finished, tiny_store):
    validations = validations_of(finished[1])
    assert [record["step"] for record in validations] == [0, 5, 10, 12]
    reader, model, objective = make_model(tiny_store)
    with torch.no_grad():
        sums = model(reader.read_rows(reader.rows - HELD_OUT, reader.rows, objective.request))
    expected = {f"valid_{name}": (part.total / part.count).item() for name, part in sums.items()}
    expected["valid_loss"] = expected["valid_mha"] + 0.1 * expected["valid_hs"] + 2 * expected["valid_od"]
    assert validations[0] == pytest.approx({"step": 0, **expected}, rel=1e-5)


def test_a_short_last_validation_batch_counts_for_what_it_holds(run_training, finished, tmp_path):
    records = run_training(tmp_path / "student", micro_batch_size=2, steps=1, warmup=1)
    assert validations_of(records)[0] == pytest.approx(validations_of(finished[1])[0], rel=1e-5)


def test_a_cache_that_fails_in_a_validation_loses_nothing(run_training, finished, tmp_path, monkeypatch):
    from student_train.train import loop

    losses = loop.validation_losses

    def fail_at_step_5(run, engine, tell_skipped):
        if engine.global_steps == 5:
            raise StoreError("block 12 cannot be read")
        return losses(run, engine, tell_skipped)

    monkeypatch.setattr(loop, "validation_losses", fail_at_step_5)
    out = tmp_path / "student"
    with pytest.raises(StoreError, match=r"block 12 cannot be read\n5 steps are saved"):
        run_training(out, save_every=100)
    monkeypatch.undo()
    records = run_training(out, save_every=100, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])


def test_held_out_rows_of_a_damaged_block_are_skipped_and_counted(run_training, tiny_store, tmp_path, capsys):
    """The losses are those of the rows that are left."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    damage_block(store, 12)
    settings = {"cache": (str(store),), "valid_share": 15 / 101, "steps": 1, "valid_every": 1}
    records = validations_of(run_training(tmp_path / "student", **settings, on_bad_block="skip"))
    assert [record["valid_skipped_rows"] for record in records] == [5, 5]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 1 and "block 12 of" in told[0]
    run = prepare_run(TrainSettings(**settings, method="hs", out=str(tmp_path), device="cpu", on_bad_block="skip"))
    batch = run.reader.read_rows(86, 96, run.objective.request)
    with torch.no_grad():
        (loss,) = run.model.eval()(batch).values()
    settings |= {"method": "hs", "weights": None}
    records = validations_of(run_training(tmp_path / "hs", **settings, on_bad_block="skip"))
    assert records[0]["valid_hs"] == pytest.approx((loss.total / loss.count).item(), rel=1e-5)


def test_no_held_out_row_at_all_ends_the_run(run_training, tiny_store, tmp_path):
    """Else every student would have the loss 0, and the untrained one would be the best."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    damage_block(store, 12)
    with pytest.raises(StoreError, match=r"none of the 5 held-out rows of .*cache\.zarr can be read"):
        run_training(tmp_path / "student", cache=(str(store),), on_bad_block="skip")


def test_held_out_rows_without_a_place_are_no_perfect_student(run_training, make_tiny_store, tmp_path):
    """Rows of unknown words alone have nothing that could be masked, and a loss of nothing is 0."""
    (tmp_path / "a.txt").write_text("babo debo fego hugi\n" + "zz zz\n" * 30)
    store = make_tiny_store(tmp_path / "cache.zarr", corpus=tmp_path / "a.txt")
    options = {"cache": (str(store),), "valid_share": 0.1, "steps": 2, "warmup": 1, "valid_every": 1, "weights": None}
    assert len(validations_of(run_training(tmp_path / "mha", method="mha", **options))) == 3
    with pytest.raises(TrainingError, match=r"held-out rows of .*cache.zarr have no place for --method od"):
        run_training(tmp_path / "od", method="od", **options)
