"""The processes that hold one teacher together: how the first one tells the others what to run.

The first leads and goes about its work as a process alone would. Whatever needs the whole teacher it gives as an order,
which the others hear and carry out beside it; in between they wait. An order is small (token ids at most); what is
computed goes through the collectives of PyTorch, by gloo between CPUs and by NCCL between GPUs. Orders are given one
after another, also from several threads, so that all processes begin their collectives in the same order.

A process that ends takes the others with it: its connections close, and whoever waits for it is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed import PrefixStore

from teacher_cache.device import choose_device
from teacher_cache.errors import DistillationError, SettingsError, TeacherError, first_line

if TYPE_CHECKING:
    from torch.distributed import Store

_PATIENCE = timedelta(days=30)
"""How long others wait for an order while the first one reads text or writes; a process that is gone is noticed."""
END = "end"
"""The last order: with it comes what the first process has come to."""
_FAILED = "failed"
Order = tuple[Any, ...]
"""What to do, and what is needed for it."""


class Processes:
    """This process among `count` that hold one teacher; number 0 leads."""

    def __init__(self, rank: int, count: int, *, on_gpus: bool = False) -> None:
        self.rank = rank
        self.count = count
        self._on_gpus = on_gpus
        self._lock = Lock()
        self._in_step = True
        self._last: torch.cuda.Event | None = None

    @classmethod
    def join(cls, rank: int, count: int, meeting: Store | None, device: str) -> Processes:
        """Meet the others that a launcher has started, each on a device of its own.

        Raises:
            SettingsError: there is no other process, or not a device for each.
        """
        if count < 2 or meeting is None:
            raise SettingsError(
                "--tensor-parallel shares one teacher among the processes that a launcher starts, and this one is "
                "alone: it would hold all of it; start it as `torchrun --nproc-per-node 2 -m cli.kdcache build "
                "--tensor-parallel ...`, with a process for each GPU, or leave --tensor-parallel out"
            )
        kind = choose_device(device).type
        _refuse_other_devices(kind)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=PrefixStore("teacher", meeting), rank=rank, world_size=count, timeout=_PATIENCE
        )
        return cls(rank, count, on_gpus=kind == "cuda")

    @property
    def leads(self) -> bool:
        """Whether this is the one that gives orders."""
        return self.rank == 0

    @contextmanager
    def order(self, *order: Any) -> Iterator[None]:
        """Tell the others what is computed inside the context; they must call the same collectives for it.

        Raises:
            TeacherError: another process is gone.
        """
        with self._lock, self.noticing_loss():
            self._in_step = False
            distributed.broadcast_object_list([order], device=torch.device("cpu"))
            if self._last is not None:
                # NCCL wants collectives in the same order on every GPU, and threads have streams of their own
                torch.cuda.current_stream().wait_event(self._last)
            yield
            self._last = torch.cuda.current_stream().record_event() if self._on_gpus else None
            self._in_step = True

    def hear(self) -> Order:
        """The next order, for which this waits. Nothing can be computed together after `END`.

        Raises:
            TeacherError: the first process has failed or is gone.
        """
        told: list[Any] = [None]
        with self.noticing_loss():
            distributed.broadcast_object_list(told, device=torch.device("cpu"))
        order: Order = told[0]
        if order[0] == _FAILED:
            raise TeacherError(
                f"process {self.rank} of {self.count} ends because the first one has failed, as its own message says"
            )
        if order[0] == END:
            distributed.destroy_process_group()
        return order

    @contextmanager
    def leading(self) -> Iterator[None]:
        """What the first process does; if it fails inside the context, the others are told to end, too."""
        try:
            yield
        except BaseException:
            # the others may wait for a collective of which this one has left out the rest
            if self._in_step:
                with suppress(DistillationError), self.order(_FAILED):
                    pass
            raise

    def end(self, result: Any) -> None:
        """Tell the others that nothing follows, and what has come of it."""
        with self.order(END, result):
            pass
        distributed.destroy_process_group()

    def compare(self, values: Any) -> None:
        """Refuse to go on where `values` are not the same in all processes.

        Raises:
            TeacherError: they are not; in all of them.
        """
        theirs: list[Any] = [None] * self.count
        distributed.all_gather_object(theirs, values)
        unlike = next((rank for rank, each in enumerate(theirs) if each != theirs[0]), None)
        if unlike is not None:
            raise TeacherError(
                f"process {unlike} of {self.count} has another teacher than the first one ({theirs[unlike]} and "
                f"{theirs[0]}): parts of both would make none; give every machine the same files of the teacher"
            )

    def side_by_side(self, values_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D / count] of every process -> [B, T, D], in the order of the processes."""
        parts = [torch.empty_like(values_BTD) for _ in range(self.count)]
        distributed.all_gather(parts, values_BTD.contiguous())
        return torch.cat(parts, dim=-1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The first process's values in all of them; the others give a tensor of that shape to be filled."""
        values = values.contiguous()
        distributed.broadcast(values, src=0)
        return values

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Where others are needed.

        Raises:
            TeacherError: one of them is gone.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo has no error of its own
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            raise TeacherError(
                f"process {self.rank} of {self.count} has lost another that holds a part of the teacher "
                f"({first_line(error)}): none can go on without it; its own message says why it ended. What is "
                "committed is safe; run the same command to continue"
            ) from error


def _refuse_other_devices(kind: str) -> None:
    """Transformers takes the GPU of a process's local rank wherever there are GPUs."""
    found = torch.accelerator.current_accelerator()
    if kind == "cpu" and found is not None and found.type != "cpu":
        raise SettingsError(
            f"--tensor-parallel with --device cpu on a machine with a device {found.type!r}: Transformers would put "
            "the parts of the teacher there; leave --device out, or hide it, as with CUDA_VISIBLE_DEVICES="
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda" and here > torch.cuda.device_count():
        raise SettingsError(
            f"--tensor-parallel with {here} processes on a machine with {torch.cuda.device_count()} GPUs: each holds "
            "its part of the teacher on one of its own; start as many processes as there are GPUs"
        )
