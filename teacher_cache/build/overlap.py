"""Work on what a forward pass gave while the next one runs.

On a GPU, coding a batch and copying it to the host wait for the device; done in the thread that launches the passes,
they would leave it idle. Here they run in a thread and a CUDA stream of their own, which starts when the pass has
ended. On a CPU the teacher has all cores already, and work is done at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

_PASSES_WAITING = 2
"""Passes whose outputs exist at a time beside the one that is running."""


class Overlap:
    """A context that has done all work when it is left. `threaded` is for where it pays: on a GPU, unless given."""

    def __init__(self, device: torch.device, *, threaded: bool | None = None) -> None:
        cuda = device.type == "cuda"
        threaded = cuda if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coder") if threaded else None
        self._device = device
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        while self._waiting and kind is None:
            self._waiting.popleft().result()

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` on what the current stream has been given so far.

        It must end with its results on the host: only then may the memory of what it read be used again.
        """
        if self._pool is None:
            work()
            return
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        self._waiting.append(self._pool.submit(self._run, work, ready))
        while len(self._waiting) > _PASSES_WAITING or self._waiting[0].done():
            self._waiting.popleft().result()
            if not self._waiting:
                return

    @torch.inference_mode()
    def _run(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
