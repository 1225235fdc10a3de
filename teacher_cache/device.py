"""Which device to use, how much memory was taken of it, and how arrays get there from the host while it computes.

An ordinary copy to a GPU makes the thread that launches kernels wait until all of them have run. `to_device` copies
without that wait, in turn with the kernels; `Transfer` copies whole blocks ahead of their use, beside the kernels;
`to_host` copies back through pinned memory and waits for its own stream alone. On a CPU nothing is copied.

Memory that a stream has used is kept for that stream: those beside the current one (`side_stream`) are made once per
device and process, however many builds, loaders and validations come and go.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.errors import SettingsError

CodedArray = NDArray[Any] | torch.Tensor
"""An array on the host, or on a device."""


def to_device(values: CodedArray, device: str | torch.device) -> torch.Tensor:
    """The same values on a device, in the order of what its current stream is given; the host does not wait."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    tensor = tensor.contiguous()
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> NDArray[Any]:
    """The same values on the host, once the current stream has computed them; other streams are not waited for."""
    if values.device.type != "cuda":
        return np.asarray(values.numpy())
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return np.asarray(pinned.numpy())


@cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:  # noqa: ARG001 - part of the cache's key
    """The stream of this process that does something beside the current one of a GPU: the same one every time."""
    return torch.cuda.Stream(device)


class Arrival:
    """Says when arrays that were sent may be read. The host does not wait for it, only the stream that reads does."""

    def __init__(self, event: torch.cuda.Event, tensors: tuple[torch.Tensor, ...]) -> None:
        self._event, self._tensors = event, tensors

    def await_in_current_stream(self) -> None:
        """Let what the current stream is given from now on read it, and keep its memory until that is done."""
        stream = torch.cuda.current_stream(self._tensors[0].device)
        stream.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(stream)


class Transfer:
    """Sends arrays to one device, from any threads. Made by the thread whose current device it is."""

    def __init__(self, device: str | torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if torch.device(device).type == "cuda":
            # a thread that is started later has another current device
            self._stream = side_stream(torch.device(device), "transfer")

    def send(
        self, arrays: Mapping[str, CodedArray], chosen: Callable[[str], bool]
    ) -> tuple[dict[str, CodedArray], Arrival | None]:
        """All arrays by name, the chosen ones being sent to the device, and their arrival; None if nothing is sent."""
        if self._stream is None:
            return dict(arrays), None
        with torch.cuda.stream(self._stream):
            sent = {name: to_device(values, self._stream.device) for name, values in arrays.items() if chosen(name)}
            if not sent:
                return dict(arrays), None
            return {**arrays, **sent}, Arrival(self._stream.record_event(), tuple(sent.values()))


def choose_device(device: str) -> torch.device:
    """The device named, or this process's GPU (the first, or the one of its local rank), or the CPU.

    Raises:
        SettingsError: there is no such device.
    """
    try:
        chosen = torch.device(_free_device() if device == "auto" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device!r} cannot be used ({error}): give cpu, cuda, cuda:N or auto") from error
    return chosen


def choose_device_type(device: str) -> str:
    """`cpu` or `cuda`, as asked for and present. For callers that use whichever GPU is the current one of the process.

    Raises:
        SettingsError: a GPU was asked for and there is none.
    """
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise SettingsError(
            "--device 'cuda' was asked for and PyTorch sees no CUDA device here: nothing would run on what you chose; "
            "use --device cpu, or install a CUDA build of PyTorch on a machine with a GPU"
        )
    return "cpu"


def _free_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    # a launcher starts one process for each GPU of a machine
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is float32 on the CPU, bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def most_memory(device: str) -> int:
    """Bytes: the most that this process has had since its start, of its GPU if it has one, else of the machine."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # what getrusage tells would be its parent's, if that had more
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


_entered = threading.Lock()
_contexts_inside: list[bool] = []
"""What was allowed before the first of the contexts that are open; an entry for each of them."""


@contextmanager
def tf32_products(*, allowed: bool) -> Iterator[None]:
    """Let GPUs round the factors of float32 matrix products to TF32's 11 bits, where that is `allowed`; else no change.

    Tensor cores then take them, ten times as fast. For computations whose other factor, or whose neighbours, are
    bfloat16, which has 8 bits. The switch is the process's, so that all of its threads compute so meanwhile; the last
    of several contexts that overlap puts back what was.
    """
    if not allowed:
        yield
        return
    # of the two interfaces the one that torch.compile reads: a mixture of both is an error
    matmul = torch.backends.cuda.matmul
    with _entered:
        _contexts_inside.append(_contexts_inside[0] if _contexts_inside else matmul.allow_tf32)
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        with _entered:
            before = _contexts_inside.pop()
            if not _contexts_inside:
                matmul.allow_tf32 = before
