"""What design knowledge of DeepSpeed the engine rests on, each against plain PyTorch or seen to happen."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from student_train.engine.config import make_config
from student_train.engine.engine import (
    ADAM_BETAS,
    _computes_in_bfloat16_on_a_gpu,
    clip_gradient,
    full_precision_weights,
    learning_rate_factor,
    parameter_groups,
    start_engine,
)
from student_train.settings import TrainSettings
from teacher_cache.errors import TrainingError

STEPS, WARMUP, BATCH = 8, 3, 12
SETTINGS = TrainSettings(method="hs", lr=1e-2, batch_size=BATCH, clip=0.5, device="cpu")


def toy_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3))


def toy_data():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)) for _ in range(STEPS)
    ]


def train_plain():
    """The same training without an engine: AdamW by its textbook definition, clipping, schedule."""
    model = toy_model()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, betas=ADAM_BETAS, weight_decay=0.01)
    losses, norms = [], []
    for step, (inputs, targets) in enumerate(toy_data()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_factor(step, warmup=WARMUP, steps=STEPS)
        loss = (model(inputs) - targets).square().sum() / BATCH
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model


def train_engine(*, stage=0, dtype=torch.float32, micro_batch=BATCH, fused=False):
    model = toy_model()
    config = make_config(SETTINGS, dtype=dtype, micro_batch=micro_batch)
    if stage is not None:
        config["zero_optimization"]["stage"] = stage
    if fused:
        config["optimizer"]["params"]["fused"] = True
    engine = start_engine(model, config, device="cpu", warmup=WARMUP, steps=STEPS)
    losses, norms = [], []
    for inputs, targets in toy_data():
        total = 0.0
        for start in range(0, BATCH, micro_batch):
            outputs = engine(inputs[start : start + micro_batch].to(dtype)).float()
            loss = (outputs - targets[start : start + micro_batch]).square().sum() / BATCH
            engine.backward(loss, scale_wrt_gas=False)
            norm = clip_gradient(engine, 0.5) if engine.is_gradient_accumulation_boundary() else None
            engine.step()
            total += loss.item()
        losses.append(total)
        norms.append(float(engine.get_global_grad_norm() if norm is None else norm))
    return losses, norms, engine


@pytest.fixture(scope="module")
def plain():
    return train_plain()


def test_float32_at_stage_0_is_plain_pytorch(plain):
    losses, norms, engine = train_engine(stage=0)
    assert losses == plain[0]
    assert norms == pytest.approx(plain[1], rel=1e-6)
    for ours, theirs in zip(engine.module.parameters(), plain[2].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stage", [1, 2])
def test_float32_at_higher_stages_is_plain_pytorch(plain, stage):
    losses, norms, _ = train_engine(stage=stage)
    assert losses == pytest.approx(plain[0], rel=1e-6)
    assert norms == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_accumulation_does_not_change_the_training(plain, micro_batch):
    losses, norms, _ = train_engine(micro_batch=micro_batch)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert norms == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stage", [None, 1])
def test_bfloat16_follows_float32_and_counts_every_step_once(plain, stage, fused):
    losses, _, engine = train_engine(stage=stage, dtype=torch.bfloat16, fused=fused)
    assert losses == pytest.approx(plain[0], rel=2e-2)
    assert engine.module[0].weight.dtype == torch.bfloat16
    assert {int(state["step"]) for state in engine.optimizer.optimizer.state.values()} == {STEPS}
    weights = full_precision_weights(engine.module)
    for name, theirs in plain[2].named_parameters():
        assert weights[name].dtype == torch.float32
        assert (weights[name] - theirs).abs().mean() < 1e-3
    # masters, not rounded weights: some value has more digits than bfloat16 holds
    assert not torch.equal(weights["0.weight"], weights["0.weight"].bfloat16().float())


@pytest.mark.parametrize("stage", [None, 1, 3])
def test_what_is_not_trained_stays_as_it_was_in_half_precision(monkeypatch, stage):
    monkeypatch.setenv("LOCAL_RANK", "0")  # stage 3 asks for it
    model = toy_model()
    frozen = {name: value.clone() for name, value in model[0].named_parameters(prefix="0")}
    model[0].requires_grad_(False)
    config = make_config(SETTINGS, dtype=torch.bfloat16, micro_batch=BATCH)
    if stage is not None:
        config["zero_optimization"]["stage"] = stage
    linear = torch.nn.functional.linear
    engine = start_engine(model, config, device="cpu", warmup=1, steps=2)
    weights = full_precision_weights(engine.module)
    torch.nn.functional.linear = linear
    assert engine.module[0].weight.dtype == torch.bfloat16
    for name, value in frozen.items():
        assert torch.equal(weights[name], value), name
        assert not torch.equal(value, value.bfloat16().float())
    engine.destroy()


@pytest.mark.parametrize("stage, total", [(1, 256), (2, 400), (3, 400)])
def test_many_passes_add_up_beyond_what_bfloat16_counts(tmp_path, monkeypatch, stage, total):
    """400 gradients of 1, which stand still at 256 where they are added up in bfloat16."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # stage 3 asks for it in every pass
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = TrainSettings(method="hs", batch_size=400, clip=0.5, device="cpu", deepspeed=str(file))
    config = make_config(settings, dtype=torch.bfloat16, micro_batch=1)
    linear = torch.nn.functional.linear
    engine = start_engine(torch.nn.Linear(1, 1), config, device="cpu", warmup=1, steps=2)
    for _ in range(400):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum(), scale_wrt_gas=False)
        engine.step()
    engine.destroy()
    torch.nn.functional.linear = linear
    # of the weight and of the bias
    assert float(engine.get_global_grad_norm()) == pytest.approx(total * math.sqrt(2), rel=1e-3)


def test_what_deepspeed_refuses_is_told_to_the_user(tmp_path):
    config = make_config(SETTINGS, dtype=torch.float32, micro_batch=BATCH)
    config["train_micro_batch_size_per_gpu"] = 5
    with pytest.raises(TrainingError, match="DeepSpeed refuses"):
        start_engine(toy_model(), config, device="cpu", warmup=1, steps=2)
    config = make_config(SETTINGS, dtype=torch.float32, micro_batch=BATCH)
    config["optimizer"]["params"]["betas"] = 5
    with pytest.raises(TrainingError, match="DeepSpeed refuses .*not subscriptable"):
        start_engine(toy_model(), config, device="cpu", warmup=1, steps=2)


def test_biases_and_norms_are_not_decayed():
    groups = parameter_groups(toy_model())
    assert [len(group["params"]) for group in groups] == [2, 4]
    assert groups[1]["weight_decay"] == 0.0
    frozen = toy_model()
    frozen[0].weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(frozen)] == [1, 4]


def test_the_learning_rate_rises_and_falls_linearly():
    factors = [learning_rate_factor(step, warmup=4, steps=12) for step in range(13)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


START = """
import sys, torch
from student_train.engine.engine import start_engine
from student_train.engine.config import make_config
from student_train.settings import TrainSettings
config = make_config(TrainSettings(method="hs"), dtype=torch.float32, micro_batch=32)
start_engine(torch.nn.Linear(2, 2), config, device="cpu", warmup=1, steps=2)
import logging, os
logging.getLogger("DeepSpeed").error("something is wrong")
sys.exit(any(name in os.environ for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")))
"""


def test_a_plain_process_starts_without_compiling_port_or_noise(tmp_path):
    """In a fresh process: no launcher's environment before or after, nothing on standard output, nothing compiled."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "DS_ACCELERATOR")}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "something is wrong" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stage, dtype",
    [(0, torch.float32), (1, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)],
)
def test_a_gradient_that_is_no_number_shows_in_its_norm(stage, dtype):
    """DeepSpeed leaves such a step out at stages 1 and 2 and goes on; only the norm tells."""
    config = make_config(SETTINGS, dtype=dtype, micro_batch=BATCH)
    config["zero_optimization"]["stage"] = stage
    engine = start_engine(toy_model(), config, device="cpu", warmup=WARMUP, steps=STEPS)
    engine.backward(engine(toy_data()[0][0].to(dtype)).float().square().sum() * torch.inf, scale_wrt_gas=False)
    norm = clip_gradient(engine, 0.5)
    engine.step()
    assert not math.isfinite(float(engine.get_global_grad_norm() if norm is None else norm))


def test_products_beside_a_student_are_coarser_where_it_computes_in_bfloat16_on_a_gpu():
    config = {
        dtype: make_config(TrainSettings(method="mha"), dtype=dtype, micro_batch=1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert _computes_in_bfloat16_on_a_gpu(config[torch.bfloat16], "cuda")
    assert not _computes_in_bfloat16_on_a_gpu(config[torch.bfloat16], "cpu")
    assert not _computes_in_bfloat16_on_a_gpu(config[torch.float32], "cuda")
