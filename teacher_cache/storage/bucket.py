"""Requests to object storage, each of them answered, tried again for a while, or refused with what to mend.

Servers restart, refuse and stall for seconds at a time, and a build of many hours meets that. Two loops try again. The
one inside obstore is short: it lets a part of a large upload outlive a hiccup, but while it runs nothing else is heard,
not even Ctrl-C. The one here goes on from there until `KDCACHE_RETRY_SECONDS` (120) have passed since the first try.
What no repetition mends (credentials, a bucket that is not there, another region) is said at once.

`create` and `replace` are what the lock stands on, see `lease.py`. A first try whose answer was lost may have
succeeded; the second then finds the object of the first and returns None. So callers must look whose object it is.

Cost: one request each, and one more to see whether there is a bucket at all where the first object asked for is absent.
Credentials come from the environment, from a profile that AWS_PROFILE names (`aws_profile.py`), or from the service
that gives them to machines in a cloud. Safe in threads. Nothing is touched before the first request.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.storage.aws_profile import profile_credentials
from teacher_cache.storage.failures import (
    CREDENTIALS,
    Failure,
    allows_plain_http,
    no_object_storage,
    refusal,
    require_aws_credentials,
    unreachable,
)
from teacher_cache.storage.keys import too_large

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import from_url
except ImportError as missing:
    raise SettingsError(
        "a store in object storage (s3://...) needs obstore, which is not installed: pip install 'kdcache[remote]'"
    ) from missing
if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PART = 2**23
"""Bytes that one request carries of a large object."""
_PARTS_AT_ONCE = 4
# counts while a request sends, too: with these parts, enough for uplinks of half a MB/s
_SILENCE = timedelta(seconds=60)
_CONNECT = timedelta(seconds=5)
_REQUEST = timedelta(minutes=20)
_HICCUP = timedelta(seconds=1)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0

_log = logging.getLogger(__name__)
# its own generator: the seeded one of the process is not to be moved by an outage
_jitter = random.SystemRandom()
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Version:
    """Which state of an object the server holds. Servers compare by tag or by number."""

    e_tag: str | None
    number: str | None

    def condition(self) -> UpdateVersion:
        """The condition of a write that it replaces this version."""
        condition: UpdateVersion = {}
        if self.e_tag is not None:
            condition["e_tag"] = self.e_tag
        if self.number is not None:
            condition["version"] = self.number
        return condition


class Bucket:
    """The objects below one prefix of a bucket: s3://bucket/prefix, gs://, az://.

    Every method raises StoreError where the server refuses, or cannot be reached for too long.

    Raises:
        SettingsError: an environment variable cannot be used.
        StoreError: the address names no object storage.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        try:
            self._kind = str(obstore.parse_scheme(location))
        except BaseError as error:
            raise no_object_storage(location, Failure.of(error).cause) from error
        if self._kind not in CREDENTIALS:
            raise no_object_storage(location, f"{self._kind} is no object storage")
        self._patience = _retry_seconds()
        self._plain_http = allows_plain_http() if self._kind == "s3" else False
        self._exists = False
        self._troubled = False

    # ---- objects ----------------------------------------------------------------------------------------------------

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        """An object; FileNotFoundError if there is none, ValueError if it has more than `most_bytes`."""

        def get() -> bytes | int:
            answer = obstore.get(self._store, key)
            size = int(answer.meta["size"])
            return size if most_bytes is not None and size > most_bytes else answer.bytes().to_bytes()

        found = self._ask("reading", key, get)
        if isinstance(found, int):
            raise too_large(found, most_bytes)
        return found

    def read_part(self, key: str, start: int, end: int, version: Version) -> bytes:
        """Bytes `start` up to `end` of an object, which must not have changed."""

        def get() -> bytes:
            answer = obstore.get(self._store, key, options={"range": (start, end), "if_match": version.e_tag})
            return answer.bytes().to_bytes()

        try:
            return self._ask("reading", key, get)
        except PreconditionError as error:
            raise StoreError(
                f"{key!r} in {self.location!r} changed while it was read: something else is writing this store; try "
                "again when that is done"
            ) from error

    def look(self, key: str, *, once: bool = False) -> tuple[bytes, Version] | None:
        """A small object and its version, None if there is none. `once`: do not try again."""

        def get() -> tuple[bytes, Version]:
            answer = obstore.get(self._store, key)
            return answer.bytes().to_bytes(), Version(answer.meta["e_tag"], answer.meta["version"])

        try:
            return self._ask("reading", key, get, once=once)
        except FileNotFoundError:
            return None

    def measure(self, key: str) -> tuple[int, Version] | None:
        """Size and version of an object, None if there is none."""
        try:
            meta = self._ask("looking for", key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return meta["size"], Version(meta["e_tag"], meta["version"])

    def list(self, folder: str = "") -> dict[str, int]:
        """Every object below `folder` with its size."""

        def collect() -> dict[str, int]:
            pages = obstore.list(self._store, folder or None, chunk_size=1000)
            return {meta["path"]: meta["size"] for page in pages for meta in page}

        return self._ask("listing", folder, collect)

    def write(self, key: str, source: bytes | Path) -> None:
        """Write an object, in parts if it is large. It appears whole, or not at all."""

        def put() -> object:
            return obstore.put(self._store, key, source, chunk_size=PART, max_concurrency=_PARTS_AT_ONCE)

        self._ask("writing", key, put, writes=True)

    def create(self, key: str, data: bytes) -> Version | None:
        """Write an object unless there is one; None if there is."""

        def put() -> Version:
            answer = obstore.put(self._store, key, data, mode="create")
            return Version(answer["e_tag"], answer["version"])

        try:
            return self._ask("writing", key, put, writes=True)
        except AlreadyExistsError:
            return None

    def replace(self, key: str, data: bytes, version: Version, *, once: bool = False) -> Version | None:
        """Write an object where it is of this version; None if it has changed or is gone. `once`: do not try again."""

        def put() -> Version:
            answer = obstore.put(self._store, key, data, mode=version.condition())
            return Version(answer["e_tag"], answer["version"])

        try:
            return self._ask("writing", key, put, writes=True, once=once)
        except PreconditionError:
            return None

    def delete(self, key: str, *, once: bool = False) -> None:
        """Delete an object if it is there. `once`: do not try again."""
        with contextlib.suppress(FileNotFoundError):  # only some servers say so
            self._ask("deleting", key, lambda: obstore.delete(self._store, key), once=once)

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _ask(
        self, verb: str, key: str, request: Callable[[], _Answer], *, writes: bool = False, once: bool = False
    ) -> _Answer:
        """The answer to a request, however often it takes; what no repetition mends is raised at once."""
        doing = f"{verb} {key!r}" if key else f"{verb} it"
        started, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                answer = request()
            except (AlreadyExistsError, PreconditionError):
                raise
            except FileNotFoundError as error:
                self._require_bucket(error, doing, writes=writes)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.location}/{key}") from error
            except BaseError as error:
                failure = Failure.of(error)
                if not failure.passing:
                    raise refusal(self.location, self._kind, doing, failure) from error
                passed = time.monotonic() - started
                if once or passed >= self._patience:
                    raise unreachable(self.location, doing, passed, failure) from error
                self._warn(doing, failure)
                time.sleep(min(_jitter.uniform(pause / 2, pause), self._patience - passed))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._exists, self._troubled = True, False
                return answer

    def _require_bucket(self, error: FileNotFoundError, doing: str, *, writes: bool) -> None:
        """A missing bucket and a missing object look alike, but only the second has a list."""
        if writes:
            raise refusal(self.location, self._kind, doing, Failure.of(error)) from error
        if not self._exists:
            self.list("bucket-exists")

    def _warn(self, doing: str, failure: Failure) -> None:
        if not self._troubled:
            self._troubled = True
            _log.warning(
                "%s does not answer when %s (%s): trying again for up to %.0f s",
                self.location, doing, failure.cause, self._patience,
            )  # fmt: skip

    @functools.cached_property
    def _store(self) -> ObjectStore:
        profile = profile_credentials(self.location) if self._kind == "s3" else None
        if self._kind == "s3" and profile is None:
            require_aws_credentials(self.location)
        client: ClientConfig = {
            "allow_http": self._plain_http,
            "connect_timeout": _CONNECT,
            "read_timeout": _SILENCE,
            "timeout": _REQUEST,
        }
        retry: RetryConfig = {
            "max_retries": 100,
            "retry_timeout": min(_HICCUP, timedelta(seconds=self._patience)),
            "backoff": {"init_backoff": timedelta(seconds=0.25), "max_backoff": timedelta(seconds=1), "base": 2},
        }
        try:
            return from_url(self.location, client_options=client, retry_config=retry, credential_provider=profile)
        except BaseError as error:
            raise StoreError(
                f"{self.location!r} cannot be opened ({Failure.of(error).cause}): set {CREDENTIALS[self._kind]}"
            ) from error


def _retry_seconds() -> float:
    value = os.environ.get("KDCACHE_RETRY_SECONDS") or "120"
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise SettingsError(
            f"KDCACHE_RETRY_SECONDS is {value!r}: give the seconds to go on trying when a server does not answer, "
            "such as 120"
        )
    return seconds
