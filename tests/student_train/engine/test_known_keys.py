"""Names in a DeepSpeed file that the installed DeepSpeed would pass over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.engine.config import make_config
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError


def config_of(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(json.dumps(content))
    settings = TrainSettings(method="hs", deepspeed=str(file))
    return make_config(settings, dtype=torch.float32, micro_batch=4, processes=2)


@pytest.mark.parametrize(
    "content, told",
    [
        ({"zero_optimisation": {"stage": 3}}, r"'zero_optimisation', which DeepSpeed does not know.*zero_optimization"),
        ({"zero_optimisation": "auto"}, "'zero_optimisation', which DeepSpeed does not know"),
        ({"optimizer": {"parameters": {"lr": 1}}}, r"'optimizer.parameters', which .*params"),
        ({"scheduler": {"type": "WarmupLR", "param": {}}}, "'scheduler.param', which"),
        ({"activation_checkpointing": {"profil": True}}, r"'activation_checkpointing.profil', which .*profile"),
        ({"zero_optimization": {"stag": 1}}, "refused by DeepSpeed .*stag Extra inputs are not permitted"),
        ({"tensorboard": {"enable": True}}, "refused by DeepSpeed .*enable Extra inputs are not permitted"),
        ({"optimizer": {"type": None}}, "optimizer.type to None, which names no optimizer"),
        ({"optimizer": {"type": 3}}, "optimizer.type to 3, which names no optimizer"),
        ({"scheduler": {}}, "scheduler.type to None, which names no scheduler"),
    ],
)
def test_what_deepspeed_does_not_know_is_refused(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        config_of(tmp_path, content)


def test_what_deepspeed_knows_passes(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_allow_untested_optimizer": True,
        "activation_checkpointing": {"partition_activations": False},
        "flops_profiler": {"enabled": False},
        "tensorboard": {"enabled": False},
        "checkpoint": {"tag_validation": "Warn"},
        "wall_clock_breakdown": False,
        "steps_per_print": 100,
    }
    config = config_of(tmp_path, content)
    assert type(config["optimizer"]) is dict and {name: config[name] for name in content} == content | {
        "optimizer": {**content["optimizer"], "params": config["optimizer"]["params"]}
    }
