"""Copies within an object store, whose bytes never pass through this machine. tensorstore knows none.

The vendors' own libraries do it: boto3 (fusectl[s3]) and google-cloud-storage (fusectl[gcs]). Without them objects are
read and written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from fusectl.errors import StorageError


# Copies one object: from a bucket and a key to a bucket and a key.
Copy = Callable[[str, str, str, str], None]
_LIBRARIES = {"s3": ("boto3", "s3"), "gs": ("google.cloud.storage", "gcs")}


def missing_library(scheme: str) -> str | None:
    """The extra of fusectl that copies within this kind of store, if it is not installed."""
    library, extra = _LIBRARIES[scheme]
    try:
        return None if find_spec(library) else extra
    except ModuleNotFoundError:
        return extra


def copier(scheme: str) -> Copy | None:
    """What copies objects within this kind of store; None if its library is not installed."""
    if missing_library(scheme):
        return None
    return _s3() if scheme == "s3" else _gcs()


def _s3() -> Copy:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    client = boto3.client("s3", region_name=region)
    # What is larger than a request can copy goes in parts; copies run side by side already.
    config = TransferConfig(use_threads=False)

    def copy(bucket: str, key: str, to_bucket: str, to_key: str) -> None:
        try:
            client.copy({"Bucket": bucket, "Key": key}, to_bucket, to_key, Config=config)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey"}:
                raise FileNotFoundError(f"s3://{bucket}/{key}") from error
            raise StorageError(f"s3://{bucket}/{key}: cannot be copied", details=(str(error),)) from error
        except BotoCoreError as error:
            raise StorageError(f"s3://{bucket}/{key}: cannot be copied", details=(str(error),)) from error

    return copy


def _gcs() -> Copy:
    from google.api_core.exceptions import GoogleAPIError, NotFound
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    client = _gcs_client(storage)

    def copy(bucket: str, key: str, to_bucket: str, to_key: str) -> None:
        source = client.bucket(bucket).blob(key)
        target = client.bucket(to_bucket).blob(to_key)
        # Safe to be asked twice: whoever copies here is the only writer.
        rewrite = partial(target.rewrite, source, timeout=_TIMEOUT_S, retry=DEFAULT_RETRY)
        try:
            token, _, _ = rewrite()
            while token is not None:
                token, _, _ = rewrite(token=token)
        except NotFound as error:
            raise FileNotFoundError(f"gs://{bucket}/{key}") from error
        except (GoogleAPIError, GoogleAuthError, OSError) as error:
            raise StorageError(f"gs://{bucket}/{key}: cannot be copied", details=(str(error),)) from error

    return copy


_TIMEOUT_S = 60


def _gcs_client(storage: Any) -> Any:
    """A client of the server that tensorstore talks to."""
    endpoint = os.environ.get("TENSORSTORE_GCS_HTTP_URL")
    if endpoint is None:
        return storage.Client()
    from google.auth.credentials import AnonymousCredentials

    return storage.Client("none", AnonymousCredentials(), client_options={"api_endpoint": endpoint})
