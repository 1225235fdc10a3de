"""The student of the lowest validation loss: when it is kept in OUT/best, and when it is not."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

from student_train.engine.checkpoint import checkpoint_path
from tests.student_train.train.trainings import STEPS, validations_of


def test_a_best_student_that_is_not_kept_any_more_is_not_named(run_training, finished, tmp_path):
    """Its directory stays where the run was; here the next best one is kept or exported."""
    out = tmp_path / "student"
    run_training(out, resume=str(checkpoint_path(finished[0], 8)))
    assert json.loads((out / "provenance.json").read_text())["result"]["best_step"] == STEPS


def test_a_student_that_gets_worse_leaves_the_best_one_behind(run_training, tmp_path):
    out = tmp_path / "student"
    rising = {"deepspeed": str(tmp_path / "rising.json"), "valid_every": 1}
    rates = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1.0, "warmup_num_steps": STEPS, "warmup_type": "linear"}
    (tmp_path / "rising.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": rates}}))
    records = run_training(out, **rising)
    valid = {record["step"]: record["valid_loss"] for record in validations_of(records)}
    best = min(valid, key=valid.__getitem__)
    assert 0 < best < STEPS
    result = json.loads((out / "best" / "provenance.json").read_text())["result"]
    assert (result["step"], result["valid"]["valid_loss"]) == (best, valid[best])
    assert json.loads((out / "provenance.json").read_text())["result"]["best_step"] == best
    last, kept = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (out, out / "best"))
    assert any(not torch.equal(weight, kept[name]) for name, weight in last.items())


def test_what_was_best_is_known_after_a_resume(run_training, finished, tmp_path):
    """The last student, which OUT is, and the untrained one, which is nowhere: both are no loss to be made good."""
    out = Path(shutil.copytree(finished[0], tmp_path / "student"))
    before = json.loads((out / "provenance.json").read_text())["result"]
    assert before["best_step"] == STEPS
    run_training(out, resume="auto")
    assert json.loads((out / "provenance.json").read_text())["result"] == before
    (tmp_path / "worse.json").write_text(
        json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1.0, "warmup_max_lr": 1.0}}})
    )
    worse = {"deepspeed": str(tmp_path / "worse.json")}
    run_training(tmp_path / "whole", **worse)
    run_training(tmp_path / "resumed", **worse, resume=str(checkpoint_path(tmp_path / "whole", 8)))
    for name in ("whole", "resumed"):
        result = json.loads((tmp_path / name / "provenance.json").read_text())["result"]
        assert result["best_step"] == 0 and result["best_valid_loss"] < result["valid"]["valid_loss"]
        assert not (tmp_path / name / "best").exists()


def test_a_student_that_gets_better_to_the_end_leaves_itself_alone(finished):
    out, records = finished
    valid = validations_of(records)
    assert min(valid, key=lambda record: record["valid_loss"]) == valid[-1]
    assert not (out / "best").exists()
