"""What object storage means when it fails: whether trying again can help and, if not, what the user must mend.

obstore hands on the text of a failure: a sentence, the server's XML, and the chain of causes as Rust prints it. Status,
code and cause are read from there; what is not recognised may pass. Settings that cannot work (no credentials anywhere,
an endpoint that is no address) are found here before a request hangs on them.
"""

from __future__ import annotations

import http.client
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from teacher_cache.errors import DistillationError, SettingsError, SpaceError, StoreError

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where they are temporary)",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""The environment variables of each kind of storage that hold credentials."""
_PLACE = {
    "s3": "AWS_REGION, and AWS_ENDPOINT_URL where the server is not Amazon's",
    "gcs": "the name of the bucket",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME and the name of the container",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# any of these tells obstore where credentials are, or to do without
_AWS_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
)
_METADATA_SECONDS = 2.0

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_SERVER = re.compile(r"https?://[^/\s]+")
_INNER_CAUSE = re.compile(r'(?:message|error): "([^"]+)"|\b(InvalidCertificate\(\s*\w+)')

_PASSING_4XX = {408, 409, 429}
_LASTING_5XX = {501, 507}
_LASTING_WORDS = ("redirect without LOCATION", "builder error", "InvalidCertificate")
# where the services live that give credentials to machines
_METADATA_PATHS = ("/latest/api/token", "/latest/meta-data/")
_CREDENTIAL_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed request."""

    status: int
    """The server's HTTP status, 0 if it gave none."""
    credentials: bool
    """Whether credentials were refused, or could not be had."""
    cause: str
    """Who said what, in one line."""
    passing: bool
    """Whether the same request may succeed later."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Read an error of obstore."""
        text = str(error)
        status, code, message, server = (_first(pattern, text) for pattern in (_STATUS, _CODE, _MESSAGE, _SERVER))
        if status:
            cause = " ".join(part for part in (status, code, message) if part)
        elif "TimedOut" in text:
            cause = "no answer in time"
        else:
            sentence = text.partition("\n")[0].rpartition(" - ")[2]
            inner = ["".join(found) for found in _INNER_CAUSE.findall(text)]
            cause = re.sub(r"\(\s*", " ", (inner or [sentence])[-1])
        number = int(status or 0)
        refused = 400 <= number < 500 and number not in _PASSING_4XX
        lasting = refused or number in _LASTING_5XX or any(word in text for word in _LASTING_WORDS)
        # every other class of obstore is a definite answer
        passing = type(error).__name__ == "GenericError" and not lasting
        credentials = number in (401, 403) or code in _CREDENTIAL_CODES or any(path in text for path in _METADATA_PATHS)
        cause = f"{server}: {cause}" if server else cause
        return cls(status=number, credentials=credentials, cause=cause, passing=passing)


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group(found.re.groups) if found else ""


def refusal(location: str, kind: str, doing: str, failure: Failure) -> DistillationError:
    """The error that tells the user what to mend. `kind` is obstore's name of the scheme, `doing` "reading 'key'"."""
    if failure.credentials:
        return StoreError(
            f"{location!r} refuses access when {doing} ({failure.cause}): set {CREDENTIALS[kind]} to credentials that "
            f"may list, read, write and delete there, and check {_PLACE[kind]}"
        )
    if failure.status == 404:
        return StoreError(
            f"{location!r} names a bucket that does not exist ({failure.cause}): create it, or correct its name; "
            f"check also {_PLACE[kind]}"
        )
    if failure.status == 507:
        return SpaceError(
            f"no space left when {doing} in {location!r} ({failure.cause}): committed blocks are safe and whole; free "
            "some space and run the same command again, it continues there"
        )
    return StoreError(
        f"{location!r} refuses the request when {doing} ({failure.cause}): trying again would not help; check the "
        f"address and {_PLACE[kind]}"
    )


def unreachable(location: str, doing: str, seconds: float, failure: Failure) -> StoreError:
    """The error after trying for long enough."""
    return StoreError(
        f"{location!r} did not answer for {seconds:.0f} s when {doing} (last: {failure.cause}): what was committed is "
        "safe and whole; run the same command again once the server can be reached, it continues there "
        "(KDCACHE_RETRY_SECONDS sets how long to try)"
    )


def no_object_storage(location: str, cause: str) -> StoreError:
    """The error for an address that cannot be used."""
    return StoreError(
        f"{location!r} cannot be used as a place for a store ({cause}): write s3://bucket/name (or gs://, az://), or "
        "give a folder"
    )


def allows_plain_http() -> bool:
    """Whether requests to S3 may go unencrypted: an endpoint of the environment says http://, or AWS_ALLOW_HTTP does.

    Raises:
        SettingsError: an endpoint is no address.
    """
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    for name in _ENDPOINTS:
        if value := os.environ.get(name):
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise SettingsError(
                    f"{name} is {value!r}, which is no address of a server: write http://host:port or https://host"
                )
            allowed = allowed or parts.scheme == "http"
    return allowed


def require_aws_credentials(location: str) -> None:
    """Refuse to start without credentials: obstore would ask a machine outside of Amazon's cloud for them, for minutes.

    Raises:
        StoreError: the environment has none, and no metadata service answers.
    """
    if any(os.environ.get(name) for name in _AWS_SOURCES) or _metadata_service_answers():
        return
    raise StoreError(
        f"no credentials for {location!r}: set {CREDENTIALS['s3']}, or AWS_PROFILE to a profile in ~/.aws; a public "
        "bucket needs AWS_SKIP_SIGNATURE=true"
    )


def _metadata_service_answers() -> bool:
    """Whether this machine gets credentials from its cloud (EC2's instance metadata, version 2)."""
    address = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=_METADATA_SECONDS)
    try:
        connection.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
