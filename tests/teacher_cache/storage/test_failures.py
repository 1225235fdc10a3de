"""Errors as obstore words them: what passes and what lasts, whose fault it is, and what the user must mend."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError, PermissionDeniedError

from teacher_cache.errors import DistillationError, SettingsError, SpaceError, StoreError
from teacher_cache.storage.failures import (
    CREDENTIALS,
    Failure,
    allows_plain_http,
    no_object_storage,
    refusal,
    require_aws_credentials,
    unreachable,
)

KINDS = sorted(CREDENTIALS)


def answered(status: int, code: str = "", message: str = "") -> GenericError:
    """What obstore says of an answer that is none."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return GenericError(
        "Generic S3 error: Error performing PUT http://127.0.0.1:5000/bucket/key in 1.6ms, after 10 retries - "
        f"Server returned non-2xx status code: {status} Whatever: {body}\n\nDebug source:\nGeneric {{ ... }}"
    )


REFUSED_CONNECTION = GenericError(
    "Generic S3 error: Error performing GET http://127.0.0.1:9/bucket in 10ms, after 2 retries - HTTP error: error "
    "sending request\n\nDebug source:\nGeneric { source: reqwest::Error { kind: Request, source: Os { code: 111, "
    'kind: ConnectionRefused, message: "Connection refused" } } }'
)


@pytest.mark.parametrize("status, passing", [(500, True), (502, True), (503, True), (408, True), (409, True),
                                             (429, True), (400, False), (403, False), (404, False), (412, False),
                                             (501, False), (507, False)])  # fmt: skip
def test_a_status_says_whether_trying_again_can_help(status: int, passing: bool) -> None:
    failure = Failure.of(answered(status))
    assert (failure.status, failure.passing) == (status, passing)
    assert failure.cause == f"http://127.0.0.1:5000: {status}"


def test_server_code_and_message_are_the_cause() -> None:
    failure = Failure.of(answered(503, "SlowDown", "Reduce your request rate."))
    assert failure.cause == "http://127.0.0.1:5000: 503 SlowDown Reduce your request rate."
    assert not failure.credentials


def test_a_connection_that_was_refused_passes_and_its_inner_cause_is_told() -> None:
    failure = Failure.of(REFUSED_CONNECTION)
    assert (failure.status, failure.passing, failure.credentials) == (0, True, False)
    assert failure.cause == "http://127.0.0.1:9: Connection refused"
    silent = Failure.of(GenericError("Generic S3 error: ... - HTTP error\n\n source: reqwest::Error { TimedOut }"))
    assert silent.cause == "no answer in time" and silent.passing


@pytest.mark.parametrize(
    "error",
    [
        PermissionDeniedError("The operation lacked the necessary privileges - no"),
        GenericError("Generic S3 error: redirect without LOCATION, another region is meant"),
        GenericError("builder error: relative URL without a base"),
        GenericError("error sending request\n source: InvalidCertificate(\n    UnknownIssuer,\n)"),
    ],
)
def test_what_no_repetition_mends_does_not_pass(error: Exception) -> None:
    assert not Failure.of(error).passing


@pytest.mark.parametrize(
    "error",
    [
        answered(401),
        answered(403, "InvalidAccessKeyId", "unknown"),
        answered(400, "ExpiredToken", "The provided token has expired."),
        GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 2s - HTTP error"),
    ],
)
def test_credentials_are_known_as_such(error: Exception) -> None:
    assert Failure.of(error).credentials


@settings(max_examples=40)
@given(st.text() | st.text('<>Code/Message status:50 4()"\n-'))
def test_any_text_can_be_read(text: str) -> None:
    failure = Failure.of(GenericError(text))
    assert 0 <= failure.status <= 999 and isinstance(failure.cause, str)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "status, code, error, says",
    [
        (403, "AccessDenied", StoreError, "refuses access when writing 'key' .* set {credentials}"),
        (404, "NoSuchBucket", StoreError, "names a bucket that does not exist"),
        (507, "", SpaceError, "no space left when writing 'key' .* run the same command again"),
        (301, "PermanentRedirect", StoreError, "trying again would not help; check the address"),
    ],
)
def test_each_refusal_says_what_to_mend(
    kind: str, status: int, code: str, error: type[DistillationError], says: str
) -> None:
    found = refusal("s3://bucket/store", kind, "writing 'key'", Failure.of(answered(status, code, "why")))
    assert type(found) is error
    text = str(found)
    assert "'s3://bucket/store'" in text and str(status) in text
    with pytest.raises(error, match=says.format(credentials=CREDENTIALS[kind].split()[0])):
        raise found


def test_giving_up_names_the_last_cause_and_the_variable() -> None:
    text = str(unreachable("s3://bucket/store", "reading 'key'", 119.7, Failure.of(REFUSED_CONNECTION)))
    for part in ("'s3://bucket/store' did not answer for 120 s when reading 'key'", "Connection refused", "safe",
                 "KDCACHE_RETRY_SECONDS"):  # fmt: skip
        assert part in text
    assert "write s3://bucket/name" in str(no_object_storage("ftp://host", "ftp is no object storage"))


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a word on object storage."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables, allowed",
    [
        ({}, False),
        ({"AWS_ENDPOINT_URL": "https://host"}, False),
        ({"AWS_ENDPOINT_URL": "http://host:9000"}, True),
        ({"AWS_ENDPOINT_URL_S3": "http://host", "AWS_ENDPOINT": "https://host"}, True),
        ({"AWS_ALLOW_HTTP": "True"}, True),
        ({"AWS_ALLOW_HTTP": "false"}, False),
        ({"AWS_ENDPOINT_URL": ""}, False),
    ],
)
def test_plain_http_is_allowed_by_an_endpoint_that_says_so(
    bare: pytest.MonkeyPatch, variables: dict[str, str], allowed: bool
) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    assert allows_plain_http() == allowed


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
@pytest.mark.parametrize("value", ["host:9000", "ftp://host", "http://", "https:/host", "//host"])
def test_an_endpoint_that_is_no_address_is_refused_by_name(bare: pytest.MonkeyPatch, name: str, value: str) -> None:
    bare.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} is '{value}', which is no address of a server"):
        allows_plain_http()


@pytest.fixture
def metadata_service() -> Iterator[list[int]]:
    """A service that answers with the first status of a list; its address is that which the cloud's would have."""
    statuses = [200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.send_response(statuses[0])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield statuses
    server.shutdown()
    server.server_close()


def test_credentials_come_from_the_environment_or_from_the_cloud(
    bare: pytest.MonkeyPatch, metadata_service: list[int]
) -> None:
    require_aws_credentials("s3://bucket")
    metadata_service[0] = 503
    with pytest.raises(StoreError, match="no credentials for 's3://bucket': set AWS_ACCESS_KEY_ID"):
        require_aws_credentials("s3://bucket")
    for name in ("AWS_SKIP_SIGNATURE", "AWS_SECRET_ACCESS_KEY"):
        bare.setenv(name, "true")
        require_aws_credentials("s3://bucket")
        bare.delenv(name)
    bare.setenv("AWS_ACCESS_KEY_ID", "")
    with pytest.raises(StoreError, match="AWS_SKIP_SIGNATURE=true"):
        require_aws_credentials("s3://bucket")
