"""A store in a bucket, beyond what every storage must do (test_base.py), its requests (test_bucket.py) and its lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.storage.remote import RemoteStorage

if TYPE_CHECKING:
    from tests.conftest import S3Server


def test_a_folder_lasts_as_long_as_its_storage(s3: S3Server) -> None:
    storage = RemoteStorage(f"{s3.bucket('folders')}/store")
    storage.write("teacher/config.json", b"{}")
    folder = storage.folder("teacher")
    assert (folder / "config.json").read_bytes() == b"{}"
    del storage
    assert not folder.exists()
