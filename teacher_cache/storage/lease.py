"""The right to write below a prefix of a bucket: one holder at a time, on whatever machine, however the last one ended.

The right is an object. Who creates it first holds it, and a thread writes it anew every few seconds for as long as that
lasts. Others watch its version: if it changes, the holder lives and they are refused; if it stays the same for a whole
lease, they replace exactly that version, and only one of them can. No clocks are compared, only changes seen, so those
of the machines may be wrong. A holder that is certainly dead, a process of this very machine that is gone, is replaced
at once.

A holder that could not renew for a whole lease may have lost the right: `ensure` renews before anything more is
written, and fails if somebody else has taken over. A write that was under way at that moment may still arrive; what it
spoils is found, because a commit says which bytes must be there.

Cost: one small request every sixth of a lease. After a kill another machine waits one lease, 30 s.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from types import TracebackType
from typing import Any

from teacher_cache.errors import DistillationError, StoreError
from teacher_cache.outside import parse_record
from teacher_cache.processes import describe_holder, is_gone, this_process
from teacher_cache.storage.bucket import Bucket, Version

LEASE_SECONDS = 30.0
_RENEWALS = 6
"""Renewals per lease."""
_ALIVE = 2
"""Renewals seen that prove a living holder: a single one may have been under way when its sender died."""

_NOBODY = "nobody"

_log = logging.getLogger(__name__)


class Lease:
    """Held from `__enter__` to `__exit__`. For one use, by any threads of one process.

    Raises:
        StoreError: somebody else holds the right, or the server cannot give it to one alone.
    """

    def __init__(self, bucket: Bucket, key: str, seconds: float = LEASE_SECONDS) -> None:
        self._bucket = bucket
        self._key = key
        self._seconds = seconds
        self._holder = this_process()
        self._renewals = 0
        self._version = Version(None, None)
        self._renewed = 0.0
        self._taken_by: str | None = None
        self._mutex = threading.Lock()
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="kdcache-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._version = self._create() or self._take_over()
        self._renewed = time.monotonic()
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._keeper.join(self._seconds)
        if self._taken_by is not None:
            return
        try:
            found = self._bucket.look(self._key, once=True)
            if found is not None and self._is_ours(found[0]):
                self._bucket.delete(self._key, once=True)
        except StoreError as failure:
            _log.warning(
                "the lock %r is left behind and ends by itself in %.0f s: %s", self._key, self._seconds, failure
            )

    def ensure(self) -> None:
        """Return if the right is still held.

        Raises:
            StoreError: it is not, and nothing more must be written.
        """
        if time.monotonic() - self._renewed > self._seconds:
            self._renew()
        if self._taken_by == _NOBODY:
            raise StoreError(
                f"somebody deleted the lock {self._key!r} of {self._bucket.location!r} that this process held: another "
                "one may have begun to write since; what was committed is safe, run the same command again"
            )
        if self._taken_by is not None:
            raise StoreError(
                f"{self._bucket.location!r} is now being written by {self._taken_by}: this process could not renew its "
                f"lock for {self._seconds:.0f} s and lost it; what was committed is safe, run the same command again "
                "when the other is done"
            )

    # ---- getting ----------------------------------------------------------------------------------------------------

    def _create(self) -> Version | None:
        created = self._bucket.create(self._key, self._content())
        if created is not None and self._bucket.create(self._key, self._content()) is not None:
            self._bucket.delete(self._key)
            raise StoreError(
                f"the server of {self._bucket.location!r} overwrites objects that it was told only to create (PUT with "
                "If-None-Match): two builds could not be kept apart there; build into a folder and copy that"
            )
        return created

    def _take_over(self) -> Version:
        """Wait until the holder lets go, proves to live, or proves to be dead."""
        watched: Version | None = None
        since, changes = time.monotonic(), -1
        while True:
            found = self._bucket.look(self._key)
            if found is None:
                if created := self._create():
                    return created
                continue
            data, version = found
            if self._is_ours(data):  # the answer that said so was lost
                return version
            if version != watched:
                watched, since, changes = version, time.monotonic(), changes + 1
            holder = _read_holder(data)
            if changes >= _ALIVE:
                raise StoreError(
                    f"{self._bucket.location!r} is being written by {describe_holder(holder)}: two would overwrite "
                    "each other's blocks; wait until it is done, or stop it and run this command again"
                )
            if time.monotonic() - since >= self._seconds or is_gone(holder):
                if taken := self._bucket.replace(self._key, self._content(), version):
                    return taken
                continue
            time.sleep(self._seconds / (2 * _RENEWALS))

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._released.wait(self._seconds / _RENEWALS):
            try:
                self._renew(once=True)
            except DistillationError as failure:  # the next round tries again, and who writes asks `ensure`
                _log.debug("the lock %r is not renewed: %s", self._key, failure)

    def _renew(self, *, once: bool = False) -> None:
        with self._mutex:
            if self._taken_by is not None:
                return
            self._renewals += 1
            started = time.monotonic()
            version = self._bucket.replace(self._key, self._content(), self._version, once=once)
            if version is None:
                found = self._bucket.look(self._key, once=once)
                if found is None or not self._is_ours(found[0]):
                    self._taken_by = describe_holder(_read_holder(found[0])) if found else _NOBODY
                    return
                version = found[1]  # written by a request whose answer was lost
            self._version, self._renewed = version, started

    def _content(self) -> bytes:
        # the count makes every renewal another object for servers that tag objects by content
        return json.dumps({**self._holder, "renewals": self._renewals}).encode()

    def _is_ours(self, data: bytes) -> bool:
        return bool(_read_holder(data).get("token") == self._holder["token"])


def _read_holder(data: bytes) -> dict[str, Any]:
    try:
        holder = parse_record(data)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
