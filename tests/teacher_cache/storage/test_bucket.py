"""Requests over the real S3 protocol: outages are survived or told, refusals are told at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.storage.remote import RemoteStorage
from tests.patience import takes_at_most

if TYPE_CHECKING:
    from tests.conftest import S3Server
    from tests.faulty_server import FaultyServer

ENDLESS = 3600.0
"""Seconds of an outage that no test sees the end of."""
LONG = 60.0
"""Less than what would pass if there were nothing to stop the waiting."""


LARGE = random.Random(0).randbytes(9_000_001)


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
