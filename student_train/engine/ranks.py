"""The processes that train one student together, as `torchrun` or `deepspeed` start them: rank r of R.

Each has its share of every batch and a copy of the student; the engine adds up their gradients. What they have to agree
on besides (numbers of positions, whether to stop, whether one of them failed) goes through a process group of its own
that lives on the hosts, so that nothing waits for a GPU. Alone, a process is rank 0 of 1 and nothing is sent anywhere.

Where one process raises an error that a user can mend, `together` makes all of them end with it. A process that dies
otherwise is the launcher's business, which ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from teacher_cache.errors import DistillationError, TrainingError

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: rank 0 alone exports and reads checkpoints back."""


def first_process() -> bool:
    """Whether this process is the one that prints: rank 0 of a launcher's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of tensors over all processes, on their device and in place; the host does not wait for a GPU."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, anything that can be pickled, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the context once all processes have come to its end.

        Raises:
            DistillationError: this process's own, or a TrainingError with the message of the one that failed.
        """
        failure: DistillationError | None = None
        try:
            yield
        except DistillationError as error:
            failure = error
        self.end_if_failed(failure, self.gather(None if failure is None else str(failure)))

    def end_if_failed(self, failure: DistillationError | None, messages: Sequence[str | None]) -> None:
        """Raise `failure`, this process's own, or else what another one's message says; nothing if there is none."""
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise TrainingError(f"process {rank} of {self.count} cannot go on, and so this one cannot: {message}")


def join_ranks(device: str) -> Ranks:
    """Meet the other processes that a launcher started, if it did.

    Raises:
        TrainingError: there are fewer GPUs on this machine than processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU to itself, there are {torch.cuda.device_count()}: "
                "two would share one and take its memory twice; start as many processes as there are GPUs"
            )
        torch.cuda.set_device(local_rank)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE) if device == "cuda" else distributed.group.WORLD
    return Ranks(rank=distributed.get_rank(), count=distributed.get_world_size(), group=group)
