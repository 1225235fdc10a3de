"""The lock of a bucket: one holder at a time, however the last one ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from teacher_cache.errors import SpaceError, StoreError
from teacher_cache.storage import lease
from teacher_cache.storage.bucket import Bucket
from teacher_cache.storage.lease import Lease
from teacher_cache.storage.remote import LOCK, RemoteStorage
from tests.patience import takes_at_most

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.faulty_server import FaultyServer


LONG, BRISK = 60.0, 400
"""Seconds of a lease that does not run out while a busy machine is slow, and so many renewals in it."""


HOLDER = f"""
import os, sys, time
from teacher_cache.storage import lease
from teacher_cache.storage.remote import RemoteStorage
lease._RENEWALS = {BRISK}
with RemoteStorage(sys.argv[1], lease_seconds={LONG}).lock():
    print("held", flush=True)
    while os.getppid() == {os.getpid()}:
        time.sleep(0.1)
"""


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long leases are renewed, and looked at, as often as short ones."""
    monkeypatch.setattr(lease, "_RENEWALS", BRISK)


@contextmanager
def holder(location: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, location]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_living_holder_keeps_the_lock_and_a_dead_one_loses_it(s3: S3Server, brisk: None) -> None:
    location = f"{s3.bucket('locks')}/killed"
    storage = RemoteStorage(location, lease_seconds=LONG)
    with holder(location) as process:
        told = json.loads(storage.read(LOCK))
        assert told["pid"] == process.pid
        with takes_at_most(LONG), pytest.raises(StoreError, match=f"is being written by process {process.pid} on "):
            storage.lock().__enter__()
        assert storage.list() == {}
        process.kill()
        process.wait()
    # a process of this machine that is gone need not be waited for
    with takes_at_most(LONG), storage.lock():
        storage.write("key", b"1")
        assert json.loads(storage.read(LOCK))["pid"] == os.getpid()
    assert storage.size(LOCK) is None


def foreign_lock(storage: RemoteStorage) -> None:
    """The lock of a process on another machine, which does not renew it."""
    told = {"host": "elsewhere", "pid": 7, "processes": "another", "since": "2024-01-01", "token": "theirs"}
    storage.write(LOCK, json.dumps(told).encode())


@pytest.mark.parametrize("content", ["foreign", "damaged"])
def test_a_lock_that_nobody_renews_is_taken_over_after_a_lease(
    content: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves with the waiting alone."""
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waited), sleep=waited.append)
    monkeypatch.setattr(lease, "time", clock)
    storage = RemoteStorage(f"{s3.bucket('locks')}/stale-{content}", lease_seconds=LONG)
    if content == "foreign":
        foreign_lock(storage)
    else:
        storage.write(LOCK, b"[")
    with storage.lock():
        assert sum(waited) == pytest.approx(LONG)
        storage.write("key", b"1")


def test_one_of_many_takes_over(s3: S3Server, faulty_s3: FaultyServer, brisk: None) -> None:
    """The lock of a process that has died, which nobody waits for."""
    location = f"{s3.bucket('locks')}/contended"
    with holder(location) as process:
        pass
    assert process.returncode == -signal.SIGKILL and RemoteStorage(location).size(LOCK)
    refused = threading.Semaphore(0)

    def contend(number: int) -> str:
        try:
            with RemoteStorage(location, lease_seconds=LONG).lock():
                for _ in range(5):
                    assert refused.acquire(timeout=LONG)
                return "held"
        except StoreError as error:
            refused.release()
            return "refused" if "is being written by" in str(error) else str(error)

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(contend, range(6))) == ["held", *["refused"] * 5]


def delete_until_refused(storage: RemoteStorage) -> None:
    while True:
        storage.delete("nothing")
        time.sleep(0.02)


def test_who_loses_the_lock_stops_writing(s3: S3Server, tmp_path: Path) -> None:
    storage = RemoteStorage(f"{s3.bucket('locks')}/lost", lease_seconds=0.6)
    (tmp_path / "file").touch()
    with storage.lock():
        storage.write("key", b"1")
        foreign_lock(storage)
        with pytest.raises(StoreError, match="process 7 on elsewhere"):
            delete_until_refused(storage)
        for action in (
            lambda: storage.write("key", b"2"),
            lambda: storage.write_file("key", tmp_path / "file"),
            lambda: storage.delete("key"),
        ):
            with pytest.raises(StoreError, match="is now being written by process 7 on elsewhere"):
                action()
    assert json.loads(storage.read(LOCK))["token"] == "theirs"
    assert storage.read("key") == b"1"


def test_who_was_cut_off_asks_before_writing(
    s3: S3Server, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder cannot reach the server for longer than a lease; meanwhile another one takes over."""
    location = f"{s3.bucket('locks')}/cut-off"
    storage = RemoteStorage(location, lease_seconds=0.6)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    other = RemoteStorage(location, lease_seconds=0.6)
    other.list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty_s3.endpoint)
    with storage.lock():
        faulty_s3.outage("errors", 600)
        with other.lock():
            faulty_s3.outage("errors", 0)
            with pytest.raises(StoreError, match="is now being written by"):
                storage.write("key", b"1")
    assert storage.list() == {}


def test_lost_answers_lose_no_lock(s3: S3Server, faulty_s3: FaultyServer, brisk: None) -> None:
    storage = RemoteStorage(f"{s3.bucket('locks')}/unheard", lease_seconds=LONG)
    faulty_s3.lost_answers = 1
    with storage.lock():
        faulty_s3.lost_answers = 1
        while faulty_s3.lost_answers:
            time.sleep(0.05)
        storage.write("key", b"1")
    assert storage.size(LOCK) is None


def test_a_server_without_conditions_gives_no_lock(s3: S3Server, faulty_s3: FaultyServer) -> None:
    storage = RemoteStorage(f"{s3.bucket('locks')}/unconditional")
    faulty_s3.ignores_conditions = True
    with pytest.raises(StoreError, match="If-None-Match"):
        storage.lock().__enter__()
    assert storage.size(LOCK) is None


def test_a_full_server_does_not_end_the_keeping_of_a_lock(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, brisk: None
) -> None:
    bucket = Bucket(s3.bucket("full"))
    with Lease(bucket, "build.lock", LONG):
        replace, tried, renewed = bucket.replace, [], []

        def full_at_first(*args: Any, **options: Any) -> Any:
            tried.append(args)
            if len(tried) <= 3:
                raise SpaceError("507: no space left in the bucket")
            version = replace(*args, **options)
            renewed.append(version)
            return version

        monkeypatch.setattr(bucket, "replace", full_at_first)
        while len(renewed) < 2:
            time.sleep(0.02)
        assert bucket.look("build.lock") is not None


def ensure_until_refused(held: Lease) -> None:
    while True:
        held.ensure()
        time.sleep(0.02)


def test_a_deleted_lock_is_told_as_such(s3: S3Server) -> None:
    bucket = Bucket(s3.bucket("deleted"))
    with Lease(bucket, "build.lock", 0.6) as held:
        bucket.delete("build.lock")
        with pytest.raises(StoreError, match="somebody deleted the lock 'build.lock'"):
            ensure_until_refused(held)
