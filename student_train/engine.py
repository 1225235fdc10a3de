"""Flags -> DeepSpeed configuration -> engine, and the things one has to know about DeepSpeed to get that right.

In: a model and the settings. Out: an engine whose optimizer is AdamW without decay of biases and norms and whose
schedule is a linear warm-up and decay. One process, on a CPU or on one GPU. Starting costs the import of DeepSpeed,
2-3 seconds; nothing is compiled. What was seen of DeepSpeed 0.19 and is handled here, each with a test:

- its CPU start compiles a C++ op for a minute that nothing here uses;
- without a launcher it looks for MPI, and it wants LOCAL_RANK in the environment;
- bfloat16 at ZeRO stage 0 runs one optimizer step with zero gradients first, which spoils Adam's bias correction;
- its log goes to standard output, which belongs to results.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError, TrainingError

TOKENS_PER_PASS = {"cpu": 8_192, "cuda": 65_536}
ADAM_BETAS = (0.9, 0.98)

DeepSpeedConfig = dict[str, Any]


def choose_device(settings: TrainSettings) -> str:
    """`cpu` or `cuda`, as asked for and present."""
    if settings.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if settings.device == "cuda":
        raise SettingsError(
            "--device 'cuda' was asked for and PyTorch sees no CUDA device here: training would not run on what you "
            "chose; use --device cpu, or install a CUDA build of PyTorch on a machine with a GPU"
        )
    return "cpu"


def choose_dtype(settings: TrainSettings, device: str) -> torch.dtype:
    """The type of the student's passes: bfloat16 where asked for, or where a GPU has it."""
    automatic = device == "cuda" and torch.cuda.is_bf16_supported()
    if settings.dtype == "bfloat16" or (settings.dtype == "auto" and automatic):
        return torch.bfloat16
    return torch.float32


def choose_micro_batch(settings: TrainSettings, *, device: str, seq_len: int) -> int:
    """Rows per forward pass: as asked for, or the largest divisor of the batch within `TOKENS_PER_PASS`.

    Raises:
        SettingsError: what was asked for does not divide the batch.
    """
    batch, asked = settings.batch_size, settings.micro_batch_size
    if asked is None:
        most = max(1, TOKENS_PER_PASS[device] // seq_len)
        return next(rows for rows in range(min(batch, most), 0, -1) if batch % rows == 0)
    if batch % asked:
        raise SettingsError(
            f"--micro-batch-size {asked!r} does not divide --batch-size {batch!r}: the last pass of a batch would be "
            "short; give a divisor of the batch size"
        )
    return asked


def make_config(settings: TrainSettings, *, dtype: torch.dtype, micro_batch: int) -> DeepSpeedConfig:
    """The DeepSpeed configuration of these settings, overridden entry by entry by the user's JSON file.

    Raises:
        SettingsError: the file cannot be read, or asks for what flags decide or what cannot be trained right.
    """
    half = dtype == torch.bfloat16
    config: DeepSpeedConfig = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": 1 if half else 0},
        "bf16": {"enabled": half},
        "optimizer": {
            "type": "AdamW",
            # torch's own AdamW: DeepSpeed's would be compiled on the first start
            "params": {
                "torch_adam": True,
                "lr": settings.lr,
                "betas": list(ADAM_BETAS),
                "weight_decay": settings.weight_decay,
            },
        },
    }
    if settings.deepspeed is not None:
        config = _merge(config, _read_config(settings.deepspeed))
    _check_config(settings, config, micro_batch)
    return config


def _check_config(settings: TrainSettings, config: DeepSpeedConfig, micro_batch: int) -> None:
    """Refuse entries of the user's file under which training would be another one than the flags say, or wrong."""
    stage = config["zero_optimization"].get("stage", 0)
    reason = None
    if config["train_batch_size"] != settings.batch_size or config["train_micro_batch_size_per_gpu"] != micro_batch:
        reason = "sizes of batches, which the loader would not follow: give --batch-size and --micro-batch-size instead"
    elif config["bf16"].get("enabled") and stage < 1:
        # DeepSpeed would run one optimizer step with zero gradients to set itself up: Adam counts one step too many
        reason = "bf16 at ZeRO stage 0, which spoils Adam's bias correction: set zero_optimization.stage to 1 or 2"
    elif stage > 2:
        reason = f"ZeRO stage {stage}, which cuts up the weights that one process exports whole: set stage 1 or 2"
    if reason is not None:
        raise SettingsError(f"--deepspeed {settings.deepspeed!r} sets {reason}")


def _read_config(path: str) -> DeepSpeedConfig:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--deepspeed {path!r} cannot be read as JSON ({error}): training would run without your settings; "
            "correct the path or the file"
        ) from error
    if not isinstance(config, dict):
        raise SettingsError(f"--deepspeed {path!r} holds {config!r}, not an object of DeepSpeed settings: give one")
    return config


def _merge(base: DeepSpeedConfig, override: DeepSpeedConfig) -> DeepSpeedConfig:
    """Entries of `override` over those of `base`; "auto", as Hugging Face files have it, leaves the choice to us."""
    merged = dict(base)
    for name, value in override.items():
        if value == "auto":
            continue
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def learning_rate_factor(step: int, *, warmup: int, steps: int) -> float:
    """Share of the highest learning rate in update `step` (from 0): 1/warmup to 1, then falling linearly to 1/decay."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices, and biases and norms, which are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def start_engine(model: nn.Module, config: DeepSpeedConfig, *, device: str, warmup: int, steps: int) -> Any:
    """A DeepSpeed engine around `model`: call it, never its `.module`, in a training step.

    Raises:
        TrainingError: several processes were started, or DeepSpeed refuses the configuration.
    """
    deepspeed = _import_deepspeed(device)
    _start_single_process(deepspeed, device)

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup=warmup, steps=steps)
        )

    try:
        with _single_process_environment():
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[group for group in parameter_groups(model) if group["params"]],
                config=config,
                lr_scheduler=None if "scheduler" in config else schedule,
                dist_init_required=False,
            )
    except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise TrainingError(
            f"DeepSpeed refuses the configuration {json.dumps(config)} ({error}): training cannot start; correct the "
            "file given as --deepspeed"
        ) from error
    return engine


def _import_deepspeed(device: str) -> Any:
    # DeepSpeed picks its device when it is imported, and warns about having to
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    # its own handler writes to standard output; without one, the standard library's last resort is standard error
    log = logging.getLogger("DeepSpeed")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.ERROR)
    # a C++ op that only inference_all_reduce uses, and that would be compiled (about a minute, with g++) on a CPU start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _start_single_process(deepspeed: Any, device: str) -> None:
    """A process group of one, in this process: no port, no launcher, no search for MPI."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise TrainingError(
            f"a launcher started {world_size} processes (WORLD_SIZE) and kdtrain trains in one: each would train and "
            "write the same student; start it as plain `kdtrain`"
        )
    backend = "nccl" if device == "cuda" else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend)


@contextmanager
def _single_process_environment() -> Iterator[None]:
    """DeepSpeed's start reads LOCAL_RANK; left behind, it would tell child processes that a launcher started them."""
    present = "LOCAL_RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if not present:
            del os.environ["LOCAL_RANK"]


def gradient_norm(engine: Any) -> torch.Tensor | None:
    """Norm of the accumulated gradient before clipping, or None where only the optimizer step will tell.

    DeepSpeed keeps it at ZeRO stages 1 and up (`get_global_grad_norm` after the step) and drops it at stage 0.
    """
    if engine.zero_optimization():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def restore_full_precision(engine: Any) -> None:
    """Put the float32 weights that the optimizer updated in place of the model's bfloat16 ones. Ends the training."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}
    engine.module.float()
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if masters[name] is not None:
                parameter.copy_(masters[name])
