"""Which process trains which run of a sweep: one at a time each, on however many machines share the folder.

A claim is a file in `OUT/.claims`, made where there is none of its name (O_EXCL), which every file system gives to one
process alone. A kernel's lock (`flock`) would end with its holder, but on many file systems that machines share it
holds on one machine only, or nowhere. So the holder writes its claim anew every few seconds, and who finds it unchanged
for a whole lease takes the run over. No clocks are compared, only changes seen. A process of this very machine that is
gone is known to be gone, and waits for nobody.

Claims of one run are numbered, `NAME.1`, `NAME.2`, ..., and the highest number counts: to take a run over is to make
the next number, which one of several succeeds with. Numbers are never used again while a run is not complete, so that
nobody can mistake a new claim for the old one that it has watched. Released claims stay, with what came of them.

A holder that could not renew for half a lease makes the next number itself, or finds that somebody else has: `lost`
then says so, and whoever trains has to stop at once. What it wrote up to then is what any killed training leaves:
checkpoints are whole or do not count.

Cost: one small write every tenth of a lease, 60 s; after the loss of a machine its run waits that long.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from student_train.out_folder import explain_write_errors
from teacher_cache.outside import parse_record
from teacher_cache.processes import describe_holder, is_gone, this_process

FOLDER = ".claims"
LEASE_SECONDS = 60.0
RENEWALS = 10
"""Renewals per lease."""
_MOST_BYTES = 4096
_HELD = "held"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The newest claim of a run as it was found: its bytes, and what they say, {} if that is nothing."""

    number: int
    data: bytes
    record: Mapping[str, Any]

    @property
    def outcome(self) -> str | None:
        """What came of the run where the claim was released, such as `complete`."""
        state = self.record.get("state")
        return state if isinstance(state, str) and state != _HELD else None

    @property
    def holder(self) -> str:
        """Who holds it, for a message."""
        return describe_holder(self.record)


class Claims:
    """The claims of one sweep. `out` is the sweep's folder, which need not be there yet."""

    def __init__(self, out: Path, seconds: float = LEASE_SECONDS) -> None:
        self._folder = out / FOLDER
        self._out = out
        self.seconds = seconds
        self._newest: dict[str, int] = {}
        self._watched: dict[str, tuple[Seen, float]] = {}

    def look(self, name: str) -> Seen | None:
        """The newest claim of a run, None where it was never claimed. Starts or goes on with watching it."""
        number = self._newest.get(name, 0)
        while self._path(name, number + 1).exists():
            number += 1
        if number == 0:
            return None
        self._newest[name] = number
        try:
            with self._path(name, number).open("rb") as file:
                data = file.read(_MOST_BYTES)
        except FileNotFoundError:  # somebody has deleted the folder of claims
            del self._newest[name]
            return None
        found = Seen(number=number, data=data, record=_read(data))
        before = self._watched.get(name)
        if before is None or before[0] != found:
            self._watched[name] = (found, time.monotonic())
        return found

    def take(self, name: str) -> Claim | None:
        """Claim a run; None where somebody else holds it, or may.

        Raises:
            TrainingError, SpaceError: the folder cannot be written.
        """
        found = self.look(name)
        if found is not None and not self._is_free(name, found):
            return None
        claim = Claim(self, name, 1 if found is None else found.number + 1)
        with explain_write_errors(self._out):
            self._folder.mkdir(parents=True, exist_ok=True)
            return claim if claim.begin() else None

    def _is_free(self, name: str, found: Seen) -> bool:
        watched_for = time.monotonic() - self._watched[name][1]
        return found.outcome is not None or is_gone(found.record) or watched_for >= self.seconds

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}"

    def create(self, name: str, number: int, data: bytes) -> bool:
        """Make the claim of this number unless there is one; whether it was made."""
        try:
            descriptor = os.open(self._path(name, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return True

    def renew(self, name: str, number: int, data: bytes) -> bool:
        """Write a claim of ours anew; whether it is still the newest one."""
        with self._path(name, number).open("r+b") as file:
            file.write(data)
            file.truncate()
        return not self._path(name, number + 1).exists()


class Claim:
    """A run that this process may train, from `begin` to `release`. As a context it is released as `stopped`."""

    def __init__(self, claims: Claims, name: str, number: int) -> None:
        self.name = name
        self._claims = claims
        self._number = number
        self._holder = this_process()
        self._renewals = 0
        self._renewed = time.monotonic()
        self._taken = False
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="kdtrain-claim", daemon=True)

    def begin(self) -> bool:
        """Make the claim, and keep it from then on; False where somebody else was faster."""
        if not self._claims.create(self.name, self._number, self._content(_HELD)):
            return False
        self._renewed = time.monotonic()
        self._keeper.start()
        return True

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release("stopped")

    @property
    def lost(self) -> bool:
        """Whether somebody else may train this run by now: nothing more must be written."""
        return self._taken or time.monotonic() - self._renewed > self._claims.seconds

    def release(self, state: str) -> None:
        """Let others have the run, and tell them what came of it. Only the first release counts."""
        if self._released.is_set():
            return
        self._released.set()
        self._keeper.join(self._claims.seconds)
        if not self.lost:
            with suppress(OSError):  # then others wait for a lease
                self._claims.renew(self.name, self._number, self._content(state))

    def _keep(self) -> None:
        while not self._taken and not self._released.wait(self._claims.seconds / RENEWALS):
            with suppress(OSError):  # the next round tries again, and whoever trains asks `lost`
                self._renew()

    def _renew(self) -> None:
        started = time.monotonic()
        self._renewals += 1
        if started - self._renewed > self._claims.seconds / 2:
            # somebody may be about to take it over: only one of us makes the next number
            self._taken = not self._claims.create(self.name, self._number + 1, self._content(_HELD))
            self._number += not self._taken
        else:
            self._taken = not self._claims.renew(self.name, self._number, self._content(_HELD))
        self._renewed = started

    def _content(self, state: str) -> bytes:
        return json.dumps({**self._holder, "state": state, "renewals": self._renewals}).encode()


def _read(data: bytes) -> dict[str, Any]:
    try:
        record = parse_record(data, most_bytes=_MOST_BYTES)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
