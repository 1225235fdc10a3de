"""From flags and a DeepSpeed file to the configuration of the engine: what overrides what, and what is refused."""

import json

import pytest
import torch

from student_train.engine.config import choose_dtype, choose_micro_batch, flatten_config, make_config
from student_train.engine.engine import ADAM_BETAS
from student_train.settings import TrainSettings
from teacher_cache.device import choose_device_type
from teacher_cache.errors import SettingsError


def test_bfloat16_at_stage_0_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    settings = TrainSettings(method="hs", deepspeed=str(file))
    with pytest.raises(SettingsError, match="stage 0"):
        make_config(settings, dtype=torch.bfloat16, micro_batch=4)
    assert make_config(settings, dtype=torch.float32, micro_batch=4)["zero_optimization"]["stage"] == 0


def test_the_users_file_overrides_single_entries(tmp_path):
    file = tmp_path / "ds.json"
    optimizer = {"params": {"eps": 1e-6, "lr": "auto"}}
    file.write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 2}, "train_batch_size": "auto"}))
    config = make_config(TrainSettings(method="hs", lr=0.25, deepspeed=str(file)), dtype=torch.float32, micro_batch=4)
    assert config["optimizer"]["params"]["eps"] == 1e-6
    assert config["optimizer"]["params"]["lr"] == 0.25
    assert config["zero_optimization"] == {"stage": 2}
    assert config["train_batch_size"] == 32


@pytest.mark.parametrize("scheduler", [None, {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}])
def test_what_the_file_leaves_to_us_is_ours(tmp_path, scheduler):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"scheduler": scheduler, "optimizer": {"params": {"lr": "auto", "eps": 1e-6}}}))
    config = make_config(TrainSettings(method="hs", lr=0.5, deepspeed=str(file)), dtype=torch.float32, micro_batch=4)
    assert "scheduler" not in config
    assert (config["optimizer"]["params"]["lr"], config["optimizer"]["params"]["eps"]) == (0.5, 1e-6)


@pytest.mark.parametrize(
    "content, told",
    [
        ({"train_batch_size": 64}, "--batch-size"),
        ({"train_micro_batch_size_per_gpu": 2}, "--micro-batch-size"),
        ({"gradient_accumulation_steps": 3}, "--batch-size"),
        ({"zero_optimization": {"stage": 4}}, "stage to 4, which there is not"),
        ({"zero_optimization": {"stage": "two"}}, "stage to 'two'"),
        ({"zero_optimization": False}, "zero_optimization to False where DeepSpeed expects an object"),
        ({"bf16": True}, "bf16 to True where"),
        ({"optimizer": {"params": [1]}}, r"params to \[1\] where"),
        ({"optimizer": {"params": {"lr": "fast"}}}, "lr to 'fast', which is no number"),
        ({"bf16": {"enabled": True}}, "bf16 to True, which --dtype"),
        ({"fp16": {"enabled": True}}, "fp16.*--dtype"),
        ({"fp16": True}, "fp16 to True where"),
        ({"gradient_clipping": float("nan")}, "NaN is no number"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, r"betas to \[0\.9\], which is no pair"),
        ({"gradient_clipping": "1"}, "gradient_clipping to '1', which is no number"),
    ],
)
def test_what_the_file_must_not_decide_is_refused(tmp_path, content, told):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=told):
        make_config(TrainSettings(method="hs", deepspeed=str(file)), dtype=torch.float32, micro_batch=4)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"ds\.json"):
        make_config(TrainSettings(method="hs", deepspeed=str(file)), dtype=torch.float32, micro_batch=4)


def test_micro_batches_divide_the_batch():
    settings = TrainSettings(method="hs", batch_size=48)
    assert choose_micro_batch(settings, device="cpu", seq_len=128) == 48
    assert choose_micro_batch(settings, device="cpu", seq_len=512) == 16
    assert choose_micro_batch(settings, device="cpu", seq_len=10**6) == 1
    with pytest.raises(SettingsError, match="--micro-batch-size 7 does not divide --batch-size 48"):
        choose_micro_batch(TrainSettings(method="hs", batch_size=48, micro_batch_size=7), device="cpu", seq_len=128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="--device 'cuda'"):
        choose_device_type("cuda")


@pytest.mark.parametrize("kind, ours", [("SGD", False), ("adam", True), ("AdamW", True), ("auto", True)])
def test_another_optimizer_gets_no_parameters_of_adam(tmp_path, kind, ours):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": kind, "params": {"momentum": 0.5}}}))
    config = make_config(TrainSettings(method="hs", lr=0.25, deepspeed=str(file)), dtype=torch.float32, micro_batch=4)
    adam = {"torch_adam": True, "betas": list(ADAM_BETAS)} if ours else {}
    assert config["optimizer"]["params"] == {"lr": 0.25, "weight_decay": 0.01, "momentum": 0.5, **adam}


def test_a_flat_configuration_holds_everything_but_sizes():
    config = make_config(TrainSettings(method="hs", clip=0.5), dtype=torch.float32, micro_batch=4)
    flat = flatten_config({**config, "gradient_accumulation_steps": 8})
    assert flat["gradient_clipping"] == 0.5
    assert flat["optimizer.params.betas"] == list(ADAM_BETAS)
    assert not [name for name in flat if "batch" in name or "accumulation" in name]


@pytest.mark.parametrize("dtype, section", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_half_precision_adds_up_gradients_in_float32_at_stage_2(dtype, section):
    config = make_config(TrainSettings(method="hs", device="cpu"), dtype=dtype, micro_batch=4)
    assert config["zero_optimization"] == {"stage": 2}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config[section]["enabled"] and config["bf16"].get("check_grad_overflow") is (
        False if section == "bf16" else None
    )
    plain = make_config(TrainSettings(method="hs", device="cpu"), dtype=torch.float32, micro_batch=4)
    assert plain["zero_optimization"] == {"stage": 0}
    assert "data_types" not in plain and plain["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    "content, sums",
    [
        ({"zero_optimization": {"stage": 1}}, None),
        ({"zero_optimization": {"stage": 3}}, "fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
    ],
)
def test_the_users_file_decides_what_gradients_add_up_in(tmp_path, content, sums):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**content, "bf16": {"check_grad_overflow": True}}))
    settings = TrainSettings(method="hs", deepspeed=str(file), device="cpu")
    config = make_config(settings, dtype=torch.bfloat16, micro_batch=4)
    assert config.get("data_types", {}).get("grad_accum_dtype") == sums
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize(
    "params, fused",
    [({}, True), ({"fused": False}, False), ({"foreach": True}, None), ({"torch_adam": False}, None)],
)
def test_adam_is_fused_on_a_gpu_which_the_identity_of_a_run_does_not_name(tmp_path, monkeypatch, params, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"params": params}}))
    settings = TrainSettings(method="hs", deepspeed=str(file), device="cuda")
    config = make_config(settings, dtype=torch.float32, micro_batch=4)
    assert config["optimizer"]["params"].get("fused") is fused
    on_cpu = make_config(TrainSettings(method="hs", device="cpu"), dtype=torch.float32, micro_batch=4)
    assert "fused" not in on_cpu["optimizer"]["params"]
    if not params:
        assert flatten_config(config) == flatten_config(on_cpu)


def test_bfloat16_on_a_cpu_is_refused_and_not_chosen():
    with pytest.raises(SettingsError, match="--dtype 'bfloat16' on a CPU.*--dtype float32"):
        choose_dtype(TrainSettings(method="hs", dtype="bfloat16"), "cpu")
    assert choose_dtype(TrainSettings(method="hs"), "cpu") == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_computes_in_bfloat16_where_it_has_units_for_it():
    chosen = choose_dtype(TrainSettings(method="hs"), "cuda")
    assert (chosen == torch.bfloat16) == (torch.cuda.get_device_capability() >= (8, 0))
