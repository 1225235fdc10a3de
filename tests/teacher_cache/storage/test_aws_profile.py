"""Credentials from profiles in ~/.aws, as boto3 reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.storage.aws_profile import profile_credentials
from teacher_cache.storage.remote import RemoteStorage

if TYPE_CHECKING:
    from tests.conftest import S3Server


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text("[work]\naws_access_key_id = of-work\naws_secret_access_key = secret\n[empty]\n")
    config.write_text("[profile work]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("files")
def test_a_store_is_written_and_read_with_a_profile(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    location = s3_server.bucket("profiles")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_PROFILE", "work")
    provider = profile_credentials(location)
    assert provider is not None and provider()["access_key_id"] == "of-work"
    assert provider.config == {"region": "us-east-1"}
    storage = RemoteStorage(f"{location}/one")
    with storage.lock():
        storage.write("a/b", b"content")
    assert RemoteStorage(f"{location}/one").read("a/b") == b"content"


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ["empty", "nobody"])
def test_a_profile_without_credentials_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("AWS_PROFILE", name)
    with pytest.raises(StoreError, match=f"no credentials for 's3://bucket/one': AWS_PROFILE is '{name}'"):
        RemoteStorage("s3://bucket/one").read("a")


@pytest.mark.usefixtures("files")
def test_the_environment_goes_first_and_boto3_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_credentials("s3://bucket") is None
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SettingsError, match=r"AWS_PROFILE is 'work'.*pip install 'kdcache\[aws\]'"):
        profile_credentials("s3://bucket")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-environment")
    assert profile_credentials("s3://bucket") is None
