"""Whether Triton can compile on this machine.

Having Triton is not enough: before its first launch it builds a part of itself, for which it needs a C compiler,
Python's headers and a folder to write to. Containers that are made to run things in alone often lack one of them.
"""

from __future__ import annotations

import subprocess

import torch
import triton
from triton.errors import TritonError
from triton.runtime import driver

_found: dict[torch.device, str | None] = {}


@triton.jit
def _nothing(vectors):
    pass


def why_triton_cannot_compile(vectors: torch.Tensor) -> str | None:
    """What goes wrong where a kernel is launched on the device of these vectors, tried once; None if nothing does."""
    if vectors.device not in _found:
        _found[vectors.device] = _try_to_launch(vectors)
    return _found[vectors.device]


def _try_to_launch(vectors: torch.Tensor) -> str | None:
    try:
        # built when it is first asked for
        _ = driver.active
        with torch.cuda.device_of(vectors):
            _nothing[(1,)](vectors)
    except subprocess.CalledProcessError as error:
        return f"the C compiler {error.cmd[0]!r} failed; Python.h may be missing"
    except (TritonError, RuntimeError, OSError, ImportError, AssertionError) as error:
        return str(error).strip() or type(error).__name__
    return None
