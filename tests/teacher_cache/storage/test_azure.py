"""A store in a container of Azure's Blob storage, as its emulator Azurite has it, is the store on a disk.

`npm install azurite` and `KDCACHE_AZURITE=node_modules/.bin/azurite-blob` run these tests; nothing else installs it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import StoreError
from teacher_cache.storage.base import open_storage
from teacher_cache.storage.bucket import PART, Bucket
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.verify import verify_store
from tests.teacher_cache.test_remote_store import objects_of

AZURITE = os.environ.get("KDCACHE_AZURITE") or shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
# the emulator's own, which its documentation gives
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

pytestmark = pytest.mark.skipif(AZURITE is None, reason="there is no azurite-blob here")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an emulator with a container `stores`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    command = [str(AZURITE), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with subprocess.Popen([*command, "--location", str(folder), "--blobPort", str(port)]) as process:
        try:
            make_container(f"127.0.0.1:{port}", "stores")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def make_container(address: str, name: str) -> None:
    """As soon as the server answers."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03", "Content-Length": "0"}
    signed = "".join(f"{key}:{headers[key]}\n" for key in ("x-ms-date", "x-ms-version"))
    text = "PUT" + "\n" * 12 + f"{signed}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection(address)
            connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
            answer = connection.getresponse()
        except ConnectionError:
            time.sleep(0.1)
            continue
        assert answer.status == 201, answer.read()
        return
    raise AssertionError("the server does not answer")


@pytest.fixture
def azure(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the container, with the environment that leads to it."""
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": server,
    }.items():
        monkeypatch.setenv(name, value)
    return "az://stores"


def test_a_store_is_that_on_a_disk(small_settings: Callable[..., BuildSettings], nmse_store: Path, azure: str) -> None:
    location = f"{azure}/caches/one.zarr"
    build_cache(small_settings(location, precision="nmse:1e-2", views=2))  # type: ignore[arg-type]
    assert objects_of(open_storage(location)) == objects_of(LocalStorage(nmse_store))
    assert verify_store(location).whole


def test_a_version_is_replaced_once_and_what_is_there_is_not_created(azure: str) -> None:
    """What the lock of a build stands on."""
    bucket = Bucket(f"{azure}/lock")
    first = bucket.create("build.lock", b"one")
    assert first is not None and bucket.create("build.lock", b"other") is None
    assert bucket.replace("build.lock", b"two", first) is not None
    assert bucket.replace("build.lock", b"three", first) is None
    found = bucket.look("build.lock")
    assert found is not None and found[0] == b"two"


def test_a_large_object_is_streamed_and_one_that_changes_meanwhile_is_refused(azure: str) -> None:
    storage, data = open_storage(f"{azure}/large"), os.urandom(PART + 1000)
    with storage.lock():
        storage.write("teacher/large", data)
        parts = storage.stream("teacher/large")
        assert next(parts) == data[:PART]
        storage.write("teacher/large", data[::-1])
        with pytest.raises(StoreError, match="changed while it was read"):
            next(parts)
        assert b"".join(storage.stream("teacher/large")) == data[::-1]


def test_a_container_that_is_not_there_is_named(azure: str) -> None:
    with pytest.raises(StoreError, match="names a bucket that does not exist"):
        open_storage("az://nowhere/one.zarr").list()
