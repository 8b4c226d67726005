"""Copies within an object store, whose bytes never pass through this machine. tensorstore knows none.

The vendors' own libraries do it: boto3 (fusectl[s3]) and google-cloud-storage (fusectl[gcs]). Without them objects are
read and written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from fusectl.errors import StorageError
from fusectl.formats.objects import ObjectPath, aws_region


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
    """What copies objects within this kind of store; None if its library is not installed, or finds no credentials."""
    if missing_library(scheme):
        return None
    try:
        return _s3() if scheme == "s3" else _gcs()
    except Exception:  # noqa: BLE001
        # These libraries look for settings of their own. tensorstore has found its, and does it without them.
        return None


def generations(at: ObjectPath) -> Mapping[str, str] | None:
    """What tells that an object is the one that it was, for all below a place, from the vendor's own listing.

    None without the library, and where the vendor does not answer.
    """
    try:
        if missing_library(at.scheme):
            return None
        if at.scheme == "s3":
            pages = _s3_client().get_paginator("list_objects_v2").paginate(Bucket=at.bucket, Prefix=f"{at.key}/")
            return {
                each["Key"]: f"{each['ETag']} {each['LastModified']}" for p in pages for each in p.get("Contents", ())
            }
        from google.cloud import storage

        blobs = _gcs_client(storage).list_blobs(at.bucket, prefix=f"{at.key}/")
        return {blob.name: str(blob.generation) for blob in blobs}
    except Exception:  # noqa: BLE001
        return None


def _s3_client() -> Any:
    import boto3

    return boto3.client("s3", region_name=aws_region())


def _s3() -> Copy:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    client = _s3_client()
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
        # Nothing that is asked of it is about a project.
        return storage.Client("none")
    from google.auth.credentials import AnonymousCredentials

    return storage.Client("none", AnonymousCredentials(), client_options={"api_endpoint": endpoint})
