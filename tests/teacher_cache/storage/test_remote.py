"""Object storage over the real S3 protocol: outages, refusals, the lock. What all storage must do: test_storage.py."""

from __future__ import annotations

import json
import os
import random
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

from teacher_cache.errors import SettingsError, SpaceError, StoreError
from teacher_cache.storage import lease
from teacher_cache.storage.bucket import Bucket
from teacher_cache.storage.lease import Lease
from teacher_cache.storage.remote import LOCK, RemoteStorage

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.faulty_server import FaultyServer

LARGE = random.Random(0).randbytes(9_000_001)
ENDLESS = 3600.0
"""Seconds of an outage that no test sees the end of."""
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
def takes_at_most(seconds: float) -> Iterator[None]:
    """Less than what would pass if there were nothing to stop the waiting."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


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


# ---- outages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["errors", "refused"])
def test_an_outage_is_survived(kind: str, s3: S3Server, faulty_s3: FaultyServer, tmp_path: Path) -> None:
    """It begins between the requests of what is under way; a lease shorter than it is renewed after it."""
    storage = RemoteStorage(f"{s3.bucket('outage')}/{kind}", lease_seconds=min(2, faulty_s3.outage_seconds / 2))
    for key in ("read", "streamed"):
        storage.write(key, LARGE)
    storage.write("deleted", b"1")
    (tmp_path / "large").write_bytes(LARGE)
    with storage.lock(), ThreadPoolExecutor(6) as pool:
        faulty_s3.outage(kind, faulty_s3.outage_seconds, after=6)
        started = time.monotonic()
        written = [
            pool.submit(storage.write_file, "file", tmp_path / "large"),
            pool.submit(storage.write, "small", b"12"),
        ]
        streamed = pool.submit(lambda: b"".join(storage.stream("streamed")))
        read = pool.submit(storage.read, "read")
        deleted = pool.submit(storage.delete, "deleted")
        listed = pool.submit(storage.list, "re")
        for future in (*written, deleted):
            future.result()
        assert read.result() == streamed.result() == LARGE
        assert listed.result() == {"read": len(LARGE)}
        assert time.monotonic() - started > faulty_s3.outage_seconds
        storage.write("after", b"1")
    assert list(storage.list()) == ["after", "file", "read", "small", "streamed"]
    assert storage.read("file") == LARGE


def test_a_cut_answer_is_completed(s3: S3Server, faulty_s3: FaultyServer) -> None:
    storage = RemoteStorage(f"{s3.bucket('cut')}/store")
    storage.write("key", LARGE)
    faulty_s3.cut_answers = 1
    assert storage.read("key") == LARGE
    faulty_s3.cut_answers = 2
    assert b"".join(storage.stream("key")) == LARGE


def test_giving_up_says_what_to_do(
    s3: S3Server, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KDCACHE_RETRY_SECONDS", "2")
    location = f"{s3.bucket('lost')}/store"
    storage = RemoteStorage(location)
    faulty_s3.outage("errors", ENDLESS)
    with pytest.raises(StoreError) as error:
        storage.write("hidden/1", b"1")
    for part in (location, "'hidden/1'", "50", "safe", "run the same command again", "KDCACHE_RETRY_SECONDS"):
        assert part in str(error.value)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trying again for up to 2 s" in caplog.text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("KDCACHE_RETRY_SECONDS", "0")
    caplog.clear()
    with pytest.raises(StoreError, match="Connection refused"):
        RemoteStorage(location).list()
    assert "trying again" not in caplog.text


def test_waiting_can_be_interrupted(s3: S3Server, faulty_s3: FaultyServer) -> None:
    storage = RemoteStorage(f"{s3.bucket('lost')}/store")
    faulty_s3.outage("errors", ENDLESS)

    done = threading.Event()

    def interrupt() -> None:
        while not faulty_s3.failed:
            time.sleep(0.02)
        if not done.wait(0.1):
            os.kill(os.getpid(), signal.SIGINT)

    # by itself it would go on for two minutes
    with takes_at_most(LONG), pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it must not come before
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            storage.read("key")
        finally:
            done.set()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["read", "size", "stream", "list", "write", "write_file", "delete", "lock"])
def test_a_missing_bucket_is_told_at_once(action: str, s3: S3Server, tmp_path: Path) -> None:
    storage = RemoteStorage("s3://no-such-bucket/store")
    (tmp_path / "large").write_bytes(LARGE)
    actions = {
        "read": lambda: storage.read("key"),
        "size": lambda: storage.size("key"),
        "stream": lambda: list(storage.stream("key")),
        "list": storage.list,
        "write": lambda: storage.write("key", b"1"),
        "write_file": lambda: storage.write_file("key", tmp_path / "large"),
        "delete": lambda: storage.delete("key"),
        "lock": lambda: storage.lock().__enter__(),
    }
    with takes_at_most(5), pytest.raises(StoreError, match=r"'s3://no-such-bucket/store' names a bucket that does not"):
        actions[action]()


def test_wrong_credentials_are_told_at_once(s3: S3Server) -> None:
    storage = RemoteStorage(f"{s3.bucket('closed')}/store")
    storage.write("key", b"1")
    s3.request("POST", "/moto-api/reset-auth", b"0")  # from now on the server knows who may
    try:
        for action in (storage.list, lambda: storage.read("key"), lambda: storage.write("key", b"2")):
            with takes_at_most(5), pytest.raises(StoreError, match=r"InvalidAccessKeyId.*set AWS_ACCESS_KEY_ID and"):
                action()
        with takes_at_most(5), pytest.raises(StoreError, match="403"):  # an answer without a text
            storage.size("key")
    finally:
        s3.request("POST", "/moto-api/reset-auth", b"inf")


def test_no_credentials_are_told_at_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"cannot be opened .*AWS_ACCESS_KEY_ID"):
        RemoteStorage("s3://bucket/store").list()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with (
        takes_at_most(3),
        pytest.raises(StoreError, match=r"no credentials for 's3://bucket/store': set AWS_ACCESS_KEY_ID"),
    ):
        RemoteStorage("s3://bucket/store").list()


@pytest.mark.parametrize("location", ["ftp://host/x", "s3://", "memory:///x", "file:///tmp/x", "https://host/x"])
def test_addresses_of_no_object_storage_are_refused(location: str) -> None:
    with pytest.raises(StoreError, match=r"cannot be used as a place.*s3://bucket/name"):
        RemoteStorage(location)


def test_nothing_is_touched_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for location in ("s3://bucket/store", "gs://bucket/store", "az://account/container/store"):
        assert RemoteStorage(location).location == location


@pytest.mark.parametrize(
    "name, value",
    [("AWS_ENDPOINT_URL", "server:9000"), ("KDCACHE_RETRY_SECONDS", "soon"), ("KDCACHE_RETRY_SECONDS", "-1")],
)
def test_settings_that_cannot_be_are_refused(
    name: str, value: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} is '{value}'"):
        RemoteStorage("s3://bucket/store")


def test_without_obstore_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["obstore"] = None
from teacher_cache.errors import SettingsError
try:
    from teacher_cache.storage.remote import RemoteStorage
except SettingsError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kdcache[remote]'" in result.stdout


# ---- the lock -------------------------------------------------------------------------------------------------------


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


# ---- folders --------------------------------------------------------------------------------------------------------


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


def test_a_folder_lasts_as_long_as_its_storage(s3: S3Server) -> None:
    storage = RemoteStorage(f"{s3.bucket('folders')}/store")
    storage.write("teacher/config.json", b"{}")
    folder = storage.folder("teacher")
    assert (folder / "config.json").read_bytes() == b"{}"
    del storage
    assert not folder.exists()
