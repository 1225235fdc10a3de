"""The same training under other engines: ZeRO stages, number types, activation checkpointing, compiled students."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM

from student_train.engine.checkpoint import checkpoint_path
from student_train.settings import TrainSettings
from student_train.train.prepare import prepare_run
from tests.student_train.train.trainings import STEPS, steps_of, validations_of


def test_bfloat16_trains_alike_and_exports_float32(run_training, finished, tmp_path, monkeypatch):
    """Refused on a CPU for the users' sake (small gradients of norms); master weights and export can be seen there."""
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: torch.bfloat16)
    out = tmp_path / "student"
    records = run_training(out, dtype="bfloat16")
    ours, theirs = steps_of(records), steps_of(finished[1])
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=0.05)
    assert {value.dtype for value in AutoModelForMaskedLM.from_pretrained(out).state_dict().values()} == {torch.float32}


def zero_file(folder, stage, **options):
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **options}}))
    return str(file)


def assert_near(records, others, tolerance):
    assert len(records) == len(others) > 0
    for ours, theirs in zip(records, others, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_stage_3_trains_resumes_and_exports_what_stage_0_does(run_training, finished, tmp_path):
    """Every weight is cut up and brought together around the pass that needs it, even the small ones."""
    out, file = tmp_path / "student", zero_file(tmp_path, 3, stage3_param_persistence_threshold=0)
    linear = torch.nn.functional.linear
    records = run_training(out, deepspeed=file)
    assert torch.nn.functional.linear is linear, "not DeepSpeed's"
    assert_near(steps_of(records), steps_of(finished[1]), 1e-4)
    assert_near(validations_of(records), validations_of(finished[1]), 1e-4)
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (out, finished[0]))
    for name, weight in theirs.items():
        # no loss depends on the keys' bias: Adam makes steps out of its gradient's rounding
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    shutil.copytree(out, tmp_path / "again")
    resumed = run_training(tmp_path / "again", deepspeed=file, resume=str(checkpoint_path(tmp_path / "again", 8)))
    assert steps_of(resumed) == steps_of(records)


def test_activation_checkpointing_changes_nothing(run_training, finished, tmp_path):
    records = run_training(tmp_path / "student", activation_checkpointing=True)
    assert steps_of(records) == steps_of(finished[1])


@pytest.fixture
def float16_on_cpu(monkeypatch):
    """DeepSpeed and we refuse float16 on a CPU, as it is of no use there; PyTorch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: torch.float16)


def test_float16_follows_float32_and_leaves_out_steps_that_overflow(run_training, finished, float16_on_cpu, tmp_path):
    file = tmp_path / "fp16.json"
    file.write_text(json.dumps({"fp16": {"initial_scale_power": 17, "hysteresis": 1}}))
    out = tmp_path / "student"
    records = steps_of(run_training(out, deepspeed=str(file)))
    away = [record for record in records if "scaled_away" in record]
    assert 0 < len(away) < STEPS / 2
    assert all(record["grad_norm"] is None for record in away)
    kept = [record for record in records if "scaled_away" not in record]
    assert all(math.isfinite(record["grad_norm"]) for record in kept)
    # nothing was learned in the steps left out, and the learning rate waited for them
    assert [record["lr"] for record in kept] == [record["lr"] for record in steps_of(finished[1])[: len(kept)]]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    weights = AutoModelForMaskedLM.from_pretrained(out)
    assert weights.dtype == torch.float32
    vectors = weights.base_model.encoder.layer[0].output.dense.weight
    assert not torch.equal(vectors, vectors.half().float())


def test_activations_are_computed_again(tiny_store):
    """The flag does what it says: the backward pass runs each layer once more."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "steps": 1, "device": "cpu"}
    calls = []
    for checkpointing in (False, True):
        run = prepare_run(TrainSettings(**settings, activation_checkpointing=checkpointing))
        seen = []
        run.built.model.encoder.layer[0].attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses = run.model.train()(run.stand_in)
        losses["mha"].total.backward()
        calls.append(len(seen))
    assert calls == [1, 2]


def test_compiling_changes_rounding_alone(tiny_store):
    """Through the recorded attention vectors too, and with every gradient."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "student": "1x32", "steps": 1, "device": "cpu"}
    found = []
    for compiled in (False, True):
        run = prepare_run(TrainSettings(**settings, compile=compiled))
        loss = run.model.train()(run.stand_in)["mha"].total
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}))
    (plain, plain_gradients), (fast, gradients) = found
    assert fast == pytest.approx(plain, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
