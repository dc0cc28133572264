"""The connection to an S3 store, and what its errors mean.

Endpoint, region and credentials come from where every AWS tool looks: `AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`,
`~/.aws/credentials`, `AWS_SHARED_CREDENTIALS_FILE`, a pod's web identity, and so on. Nothing of them is a setting of a stage.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from components.common.core.errors import UserError

SCHEME = "s3://"
ATTEMPTS = 8  # with standard back-off and jitter about a minute; AWS_MAX_ATTEMPTS overrides it
CONNECTIONS = 16

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the credentials file"
_MEANINGS = {
    "InvalidAccessKeyId": f"the store does not know this access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not match the access key; {_CREDENTIALS}",
    "InvalidSecurity": f"the credentials are not valid; {_CREDENTIALS}",
    "ExpiredToken": "the session token has expired; get a new one",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "NoSuchBucket": "there is no such bucket; make it, or check its name and the endpoint",
    "SlowDown": "the store keeps asking to slow down; run the command again later",
    "QuotaExceeded": "the bucket's quota is used up; free some space",
    "XMinioStorageFull": "the store is full; free some space",
    "InsufficientStorage": "the store is full; free some space",
}


class Location(NamedTuple):
    """A bucket and a key, or a prefix of keys, without slashes at its ends."""

    bucket: str
    key: str

    @property
    def prefix(self) -> str:
        """What the keys below start with."""
        return f"{self.key}/" if self.key else ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")


def is_s3(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(SCHEME)


def split(uri: str) -> Location:
    """`s3://bucket/some/key` as its parts; raises UserError where there is no bucket."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    parts = key.strip("/").split("/")
    if not bucket or {"..", "."} & set(parts) or (key.strip("/") and "" in parts):
        raise UserError(f"{uri}: must be s3://bucket/key")
    return Location(bucket, key.strip("/"))


@functools.cache
def connect(attempts: int = ATTEMPTS) -> Any:
    """A boto3 client, shared by all threads.

    Args:
        attempts: of one request, the first included; the back-off between them is botocore's, exponential with jitter.

    Raises:
        UserError: the AWS environment or files cannot be used.
    """
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    with explained("s3://"):
        # A store of one's own answers by path: there is no DNS name for each of its buckets.
        plain = session.client("s3", region_name=session.region_name or "us-east-1")
        configured = session._session.get_scoped_config().get("s3") or {}
        style = configured.get("addressing_style") or ("auto" if "amazonaws.com" in plain.meta.endpoint_url else "path")
        retries: Any = {"mode": os.environ.get("AWS_RETRY_MODE", "standard")}
        retries["total_max_attempts"] = int(os.environ.get("AWS_MAX_ATTEMPTS", attempts))
        addressing: Any = {"addressing_style": style}
        config = Config(
            retries=retries,
            s3=addressing,
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=CONNECTIONS,
        )
        return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


@contextmanager
def explained(place: Any) -> Iterator[None]:
    """Turns what boto3 raises within the block into one line about `place`.

    Raises:
        UserError: instead of any error of boto3, botocore or s3transfer.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except ClientError as error:
        raise UserError(f"{place}: {_refusal(error)}") from error
    except RetriesExceededError as error:
        raise UserError(f"{place}: {_failure(error.last_exception)}") from error
    except Boto3Error as error:  # S3UploadFailedError carries the text of what it wraps
        raise UserError(f"{place}: {_one_line(error)}") from error
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{place}: {_failure(error)}") from error


def code_of(error: Any) -> str:
    """The store's code of a ClientError, such as NoSuchKey; HEAD has a number only."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(error: Any) -> str:
    code = code_of(error)
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return f"this machine's clock is {_skew(error)} the store's; set it right (NTP)"
    if code in ("AccessDenied", "403"):
        what = error.operation_name
        return f"no permission for {what}; give the access key that right, or use another key"
    return _MEANINGS.get(code) or f"{error.operation_name} failed: {code} {_one_line(error)}"


def _skew(error: Any) -> str:
    try:
        theirs = parsedate_to_datetime(error.response["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return "too far from"
    seconds = (datetime.now(UTC) - theirs).total_seconds()
    # The store's Date may come from a proxy with the machine's own clock: then the difference says nothing.
    return (
        f"{abs(seconds) / 60:.0f} minutes {'ahead of' if seconds > 0 else 'behind'}"
        if abs(seconds) > 60
        else "off from"
    )


def _failure(error: Any) -> str:
    from botocore import exceptions as botocore

    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return f"no credentials for the store; {_CREDENTIALS}"
    if isinstance(error, botocore.ConnectionError | botocore.HTTPClientError):
        asked = urlsplit(getattr(error, "kwargs", {}).get("endpoint_url", ""))
        endpoint = f"{asked.scheme}://{asked.netloc.rpartition('@')[2]}" if asked.netloc else ""  # no password in a log
        return (
            f"the store does not answer{f' at {endpoint}' if endpoint else ''}; check AWS_ENDPOINT_URL and the network"
        )
    return _one_line(error)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]


def check_read(place: Location) -> None:
    """Raises UserError unless keys below `place` can be listed."""
    with explained(place):
        connect(attempts=3).list_objects_v2(Bucket=place.bucket, Prefix=place.prefix, MaxKeys=1)


def check_write(place: Location) -> None:
    """Raises UserError unless objects can be written at `place`. Nothing is left there: an upload is begun and given up."""
    check_read(place)
    key = f"{place.prefix}.check"
    with explained(place):
        store = connect(attempts=3)
        begun = store.create_multipart_upload(Bucket=place.bucket, Key=key)
        store.abort_multipart_upload(Bucket=place.bucket, Key=key, UploadId=begun["UploadId"])
        store.delete_object(
            Bucket=place.bucket, Key=key
        )  # it is not there; but the right to delete is needed in the end
