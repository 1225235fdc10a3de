"""DeepSpeed configuration -> engine, and the things one has to know about DeepSpeed to get that right.

In: a model and the configuration. Out: an engine with the optimizer that it names, without decay of biases and norms,
and a schedule of linear warm-up and decay unless it holds another. In one process or several, which have met before
(`ranks.join_ranks`), each on a CPU or on a GPU of its own. Starting costs the import of DeepSpeed, 2-3 seconds; nothing
is compiled. What DeepSpeed 0.19 does and is handled here, each with a test:

- its CPU start compiles a C++ op for a minute that nothing here uses;
- without a launcher it looks for MPI, and it wants LOCAL_RANK in the environment;
- bfloat16 at ZeRO stage 0 runs one optimizer step with zero gradients first, which spoils Adam's bias correction;
- at stage 1 it adds up the gradients of several passes in bfloat16, where 256 of 1 are as many as 400; from stage 2 on
  it can do so in float32;
- at ZeRO stage 3 it wants LOCAL_RANK in every step, too;
- float16's scaled losses overflow now and then: it leaves such a step out, and only its counter of them tells;
- its log and some of its sections print to standard output, which belongs to results.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from teacher_cache.device import tf32_products
from teacher_cache.errors import TrainingError

ADAM_BETAS = (0.9, 0.98)
_AS_THEY_WERE = WeakTensorKeyDictionary()
"""Values of parameters that are not trained, before an engine rounded them to half precision."""

DeepSpeedConfig = dict[str, Any]


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


@contextmanager
def running_engine(model: nn.Module, config: DeepSpeedConfig, *, device: str, warmup: int, steps: int) -> Iterator[Any]:
    """A DeepSpeed engine around `model`, to the end of the context: call it, never its `.module`, in a training step.

    What DeepSpeed prints to standard output meanwhile goes to standard error. Where a student computes in bfloat16 on a
    GPU, the float32 products around it (learned maps, the decoding of targets) are TF32's, which is finer than it.

    Raises:
        TrainingError: DeepSpeed refuses the configuration.
    """
    with (
        _single_process_environment(),
        redirect_stdout(sys.stderr),
        _linear_restored(),
        tf32_products(allowed=_computes_in_bfloat16_on_a_gpu(config, device)),
    ):
        engine = start_engine(model, config, device=device, warmup=warmup, steps=steps)
        try:
            yield engine
        finally:
            engine.destroy()


def _computes_in_bfloat16_on_a_gpu(config: DeepSpeedConfig, device: str) -> bool:
    return device == "cuda" and bool(config.get("bf16", {}).get("enabled"))


@contextmanager
def _linear_restored() -> Iterator[None]:
    """Stage 3 puts a function of its own in the place of PyTorch's and leaves it there."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def start_engine(model: nn.Module, config: DeepSpeedConfig, *, device: str, warmup: int, steps: int) -> Any:
    """The engine of `running_engine`, for a caller that ends it, and that runs under a launcher at ZeRO stage 3.

    Raises:
        TrainingError: DeepSpeed refuses the configuration.
    """
    deepspeed = import_deepspeed(device)
    _start_process_group(deepspeed, device)
    if not config["zero_optimization"].get("stage"):
        config = config | {"gradient_clipping": 0.0}  # see clip_gradient

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup=warmup, steps=steps)
        )

    if any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                _AS_THEY_WERE[parameter] = parameter.detach().float().cpu().clone()
    try:
        with _single_process_environment(), redirect_stdout(sys.stderr):
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[group for group in parameter_groups(model) if group["params"]],
                config=config,
                lr_scheduler=None if "scheduler" in config else schedule,
                dist_init_required=False,
            )
    except refusals(deepspeed) as error:
        raise TrainingError(
            f"DeepSpeed refuses the configuration {json.dumps(config)} ({error}): training cannot start; correct the "
            "file given as --deepspeed"
        ) from error
    return engine


def refusals(deepspeed: Any) -> tuple[type[Exception], ...]:
    """What DeepSpeed, and the optimizers that it makes, raise where a configuration does not fit."""
    own = (deepspeed.DeepSpeedConfigError, deepspeed.runtime.zero.utils.ZeRORuntimeException)
    return (AssertionError, ValueError, TypeError, KeyError, AttributeError, *own)


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, silent on standard output and ready to start on `device` without compiling anything."""
    # DeepSpeed picks its device when it is imported, and warns about having to
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    # its calls of PyTorch's collectives by names that are going away
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    # its own handler writes to standard output; without one, the standard library's last resort is standard error
    log = logging.getLogger("DeepSpeed")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.ERROR)
    # a C++ op that only inference_all_reduce uses, and that would be compiled (about a minute, with g++) on a CPU start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _start_process_group(deepspeed: Any, device: str) -> None:
    """The group of all processes; where this is the only one, made here: no port, no launcher, no search for MPI."""
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


def clip_gradient(engine: Any, most: float) -> Tensor | None:
    """Norm of the accumulated gradient before clipping to `most` (0: no clipping), once every pass of a step is done.

    None where only the optimizer step will tell: at ZeRO stages 1 and up DeepSpeed clips and keeps the norm
    (`get_global_grad_norm` after the step). At stage 0 it would drop it, so that both are done here.
    """
    if engine.zero_optimization():
        return None
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if most > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def skipped_steps(engine: Any) -> int:
    """Steps that were left out because scaled losses overflowed; 0 unless the engine runs in float16."""
    return int(engine.skipped_steps) if engine.fp16_enabled() else 0


def full_precision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of `model`, which an engine trains, in float32 and whole, by each of its names.

    At half precision these are the weights that the optimizer updates, and those that are not trained as they were.
    Every process calls it; at ZeRO stage 3 the parts are brought together on each, one parameter after another. Where
    the engine holds whole float32 weights they are not copied.
    """
    weights: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        weights[parameter] = _full_precision(parameter)
    return {name: weights[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _full_precision(parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad and (kept := _AS_THEY_WERE.get(parameter)) is not None:
        return cast("Tensor", kept)
    partitioned = hasattr(parameter, "ds_id")
    if parameter.requires_grad and (partitioned or parameter.dtype != torch.float32):
        weight: Tensor = safe_get_full_fp32_param(parameter)
        return weight.detach().cpu()
    if not partitioned:
        return parameter.detach().float()
    with GatheredParameters([parameter]):
        return parameter.detach().float().cpu().clone()
