"""Which arithmetic a model runs in.

A model is loaded in the type of its checkpoint and moved to the type that it is to run in. Rotary frequencies stay as
they were loaded, in float32: rounded to bfloat16 they turn far positions by whole radians. So do all other buffers,
which is also what loading in that type (`from_pretrained(dtype=...)`) and DeepSpeed do.
"""

from __future__ import annotations

import torch
from torch import nn


def move_model(model: nn.Module, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move a model to a device, its parameters to a number type too; in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    nn.Module.to(model, device=device)
