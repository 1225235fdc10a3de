"""The processes that build one store together, as `torchrun` or `deepspeed` start them.

A launcher tells each process its rank and where they meet through the environment; alone, a process is rank 0 of 1.
Workers exchange a few small values through the launcher's key-value store and never tensors. They wait by asking again
and again, so that a worker that is told to stop meanwhile does stop.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.1


class Workers:
    """This process among those that build the same store."""

    def __init__(self, rank: int = 0, count: int = 1, meeting: Store | None = None) -> None:
        self.rank = rank
        self.count = count
        self._meeting = meeting
        self._sums: dict[str, int] = {}

    @classmethod
    def from_environment(cls) -> Workers:
        """The workers that the launcher started; this process alone without one."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from torch.distributed import PrefixStore, rendezvous

        meeting, rank, count = next(rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, count, PrefixStore(f"kdcache/{attempt}", meeting))

    @property
    def first(self) -> bool:
        """Whether this is the worker that does what is done once: rank 0."""
        return self.rank == 0

    @property
    def meeting(self) -> Store | None:
        """The launcher's key-value store; None of a process alone."""
        return self._meeting

    def share(self, name: str, value: Any = None) -> Any:
        """Give `value`, anything JSON, to all workers (rank 0), or wait for it (the others); returns it."""
        if self._meeting is None:
            return value
        if self.first:
            self._meeting.set(name, json.dumps(value))
            return value
        while not self._meeting.check([name]):
            time.sleep(_POLL_SECONDS)
        return json.loads(self._meeting.get(name))

    def add(self, name: str, amount: int) -> int:
        """Add to a sum over all workers; returns what it has come to."""
        if self._meeting is not None:
            return int(self._meeting.add(name, amount))
        self._sums[name] = self._sums.get(name, 0) + amount
        return self._sums[name]

    def wait_for_all(self, name: str) -> None:
        """Return once every worker is here."""
        here = self.add(name, 1)
        while here < self.count:
            time.sleep(_POLL_SECONDS)
            here = self.add(name, 0)
