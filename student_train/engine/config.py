"""Flags -> DeepSpeed configuration: device, number type, sizes of passes, and the user's own JSON file on top.

In: the settings. Out: values and a configuration that the engine takes. What a file must not decide, because the loader
or the loop would not follow it, is refused here by name, before anything is written. DeepSpeed is imported only where
there is such a file, to know its names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from student_train.engine.engine import ADAM_BETAS, DeepSpeedConfig
from student_train.engine.known_keys import check_keys
from student_train.settings import TrainSettings
from teacher_cache.device import choose_device_type
from teacher_cache.errors import SettingsError

TOKENS_PER_PASS = {"cpu": 8_192, "cuda": 65_536}
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_FUSED = "fused"
_ADAM = ("adam", "adamw")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_SECTIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Section of a DeepSpeed configuration that switches each half-precision type on."""


def choose_dtype(settings: TrainSettings, device: str) -> torch.dtype:
    """The type of the student's passes: as asked for, or bfloat16 where a GPU computes in it.

    Raises:
        SettingsError: a half-precision type was asked for on a CPU.
    """
    if settings.dtype in ("bfloat16", "float16") and device == "cpu":
        raise SettingsError(
            f"--dtype {settings.dtype!r} on a CPU: its kernels add up the gradients of all tokens in that type, and "
            "those of biases and norms come out far too small; give --dtype float32, or train on a GPU"
        )
    if settings.dtype == "auto":
        automatic = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if automatic else torch.float32
    return _DTYPES[settings.dtype]


def choose_micro_batch(settings: TrainSettings, *, device: str, seq_len: int, processes: int = 1) -> int:
    """Rows per forward pass: as asked for, or the largest divisor of a process's share within `TOKENS_PER_PASS`.

    Raises:
        SettingsError: the batch cannot be shared out evenly, or what was asked for does not divide a share.
    """
    batch, asked = settings.batch_size, settings.micro_batch_size
    if batch % processes:
        raise SettingsError(
            f"--batch-size {batch!r} cannot be shared out among {processes} processes: each must get the same number "
            f"of rows; give a multiple of {processes}"
        )
    share = batch // processes
    if asked is None:
        most = max(1, TOKENS_PER_PASS[device] // seq_len)
        return next(rows for rows in range(min(share, most), 0, -1) if share % rows == 0)
    if share % asked:
        whole = f"--batch-size {batch!r}" if processes == 1 else f"the {share} rows of each of {processes} processes"
        raise SettingsError(
            f"--micro-batch-size {asked!r} does not divide {whole}: the last pass of a batch would be short; give a "
            f"divisor of {share}"
        )
    return asked


def make_config(
    settings: TrainSettings, *, dtype: torch.dtype, micro_batch: int, processes: int = 1
) -> DeepSpeedConfig:
    """The DeepSpeed configuration of these settings, overridden entry by entry by the user's JSON file.

    Raises:
        SettingsError: the file cannot be read, or asks for what flags decide or what cannot be trained right.
    """
    config: DeepSpeedConfig = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": 2 if dtype in HALF_SECTIONS else 0},
        **{section: {"enabled": dtype == each} for each, section in HALF_SECTIONS.items()},
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
    device, override = choose_device_type(settings.device), None
    if settings.deepspeed is not None:
        override = _read_config(settings.deepspeed)
        _check_types(settings.deepspeed, override)
        if not _keeps_adam(override):
            # what every optimizer of torch takes; the rest is AdamW's
            config["optimizer"]["params"] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        config = _merge(config, override, settings.deepspeed)
        _check_config(settings, config, micro_batch, processes, dtype)
    config = _with_gpu_defaults(config, dtype, device)
    if settings.deepspeed is not None and override is not None:
        check_keys(settings.deepspeed, override, config, device=device)
    return config


def _with_gpu_defaults(config: DeepSpeedConfig, dtype: torch.dtype, device: str) -> DeepSpeedConfig:
    """What is better on a GPU and in half precision, which takes one, where the user's file says nothing of it.

    Gradients of several passes add up in float32 from stage 2 on; at stage 1 DeepSpeed would take another optimizer for
    that. In bfloat16 its search through all gradients for what is no number, which waits for the device, is left out:
    the loop sees it by the norm, a step later. AdamW's kernels are fused.
    """
    types, bfloat16, optimizer = config.get("data_types", {}), config["bf16"], config["optimizer"]
    if dtype in HALF_SECTIONS and config["zero_optimization"].get("stage", 0) > 1 and isinstance(types, dict):
        types = {"grad_accum_dtype": "fp32", **types}
    if dtype == torch.bfloat16:
        bfloat16 = {"check_grad_overflow": False, **bfloat16}
    params = optimizer["params"]
    if device == "cuda" and params.get("torch_adam") is True and not params.get("foreach"):
        optimizer = {**optimizer, "params": {_FUSED: True, **params}}
    config = {**config, "bf16": bfloat16, "optimizer": optimizer}
    return {**config, "data_types": types} if types else config


def flatten_config(config: DeepSpeedConfig) -> dict[str, Any]:
    """Every setting of a configuration by its dotted name, but for the sizes of batches and passes.

    Nor whether the optimizer's kernels are fused, which follows from the device and changes rounding alone.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": each for inner, each in flatten_config(value).items()})
        elif name not in (*_SIZES, _FUSED):
            flat[name] = value
    return flat


def _check_types(path: str, override: DeepSpeedConfig) -> None:
    """Refuse an optimizer or a scheduler that is named by nothing.

    DeepSpeed would compile an optimizer of its own for minutes, or train without a schedule.
    """
    for section, otherwise in (("optimizer", "AdamW"), ("scheduler", None)):
        content = override.get(section)
        if isinstance(content, dict) and not isinstance(kind := content.get("type", otherwise), str):
            raise SettingsError(
                f"--deepspeed {path!r} sets {section}.type to {kind!r}, which names no {section}: another one than you "
                "mean, or none, would be used; give its name as a text, or leave the section out"
            )


def _keeps_adam(override: DeepSpeedConfig) -> bool:
    optimizer = override.get("optimizer")
    kind = optimizer.get("type", "auto") if isinstance(optimizer, dict) else "auto"
    return str(kind).lower() in (*_ADAM, "auto")


def _check_config(
    settings: TrainSettings, config: DeepSpeedConfig, micro_batch: int, processes: int, dtype: torch.dtype
) -> None:
    """Refuse entries of the user's file under which training would be another one than the flags say, or wrong."""
    stage, rate = config["zero_optimization"].get("stage", 0), config["optimizer"]["params"].get("lr")
    clip, betas = config["gradient_clipping"], config["optimizer"]["params"].get("betas")
    reason = None
    if _sizes(config, processes) != (settings.batch_size, micro_batch, settings.batch_size // processes // micro_batch):
        reason = "sizes of batches, which the loader would not follow: give --batch-size and --micro-batch-size instead"
    elif other := [name for each, name in HALF_SECTIONS.items() if _enabled(config, name) != (dtype == each)]:
        enabled = _enabled(config, other[0])
        reason = f"{other[0]} to {enabled!r}, which --dtype and the device decide: give --dtype instead"
    elif stage not in (0, 1, 2, 3):
        reason = f"zero_optimization.stage to {stage!r}, which there is not: set 0, 1, 2 or 3"
    elif dtype in HALF_SECTIONS and stage < 1:
        # bf16: one optimizer step with zero gradients first, one more for Adam to count; fp16: the norm of the scaled
        # gradients is all there is to see
        reason = (
            f"{HALF_SECTIONS[dtype]} at ZeRO stage 0, where DeepSpeed spoils Adam's bias correction or hides the norm "
        )
        reason += "of the gradient: set zero_optimization.stage to 1 or more"
    elif not isinstance(rate, int | float) or not math.isfinite(rate):
        reason = f"optimizer.params.lr to {rate!r}, which is no number: set one, or leave it to --lr"
    elif not _is_pair(betas):
        reason = f"optimizer.params.betas to {betas!r}, which is no pair of numbers: set two, or leave them out"
    elif not isinstance(clip, int | float) or not 0 <= clip < math.inf:
        reason = f"gradient_clipping to {clip!r}, which is no number of at least 0: set one, or leave it to --clip"
    if reason is not None:
        raise SettingsError(f"--deepspeed {settings.deepspeed!r} sets {reason}")


def _is_pair(betas: Any) -> bool:
    if betas is None:
        return True
    return isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, int | float) for beta in betas)


def _sizes(config: DeepSpeedConfig, processes: int) -> tuple[Any, Any, Any]:
    batch, micro_batch = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    both = isinstance(batch, int) and isinstance(micro_batch, int) and micro_batch > 0
    return (
        batch,
        micro_batch,
        config.get("gradient_accumulation_steps", batch // processes // micro_batch if both else None),
    )


def _enabled(config: DeepSpeedConfig, section: str) -> bool:
    value = config.get(section)
    # what is neither an object nor empty, such as true, is meant to switch it on
    return bool(value.get("enabled")) if isinstance(value, Mapping) else bool(value)


def _read_config(path: str) -> DeepSpeedConfig:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--deepspeed {path!r} cannot be read as JSON ({error}): training would run without your settings; "
            "correct the path or the file"
        ) from error
    if not isinstance(config, dict):
        raise SettingsError(f"--deepspeed {path!r} holds {config!r}, not an object of DeepSpeed settings: give one")
    return config


def _merge(base: DeepSpeedConfig, override: DeepSpeedConfig, path: str) -> DeepSpeedConfig:
    """Entries of `override` over those of `base`; "auto", as Hugging Face files have it, leaves the choice to us."""
    merged = dict(base)
    for name, value in override.items():
        if value is None or value == "auto" or (name not in merged and _is_left_to_us(value)):
            continue
        if isinstance(merged.get(name), dict):
            if not isinstance(value, dict):
                raise SettingsError(
                    f"--deepspeed {path!r} sets {name} to {value!r} where DeepSpeed expects an object of settings: "
                    "the rest of that section would be lost; give an object, or leave the section out"
                )
            merged[name] = _merge(merged[name], value, path)
        else:
            merged[name] = value
    return merged


def _is_left_to_us(section: Any) -> bool:
    """Whether it is a section, such as a scheduler, of which some parameter is "auto": half of it means nothing."""
    parameters = section.get("params") if isinstance(section, dict) else None
    return isinstance(parameters, dict) and "auto" in parameters.values()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
