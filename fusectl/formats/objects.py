"""Object stores: checkpoints in buckets, with as much of pathlib's interface as finding and opening them takes.

A bucket has no directories: what is below `gs://bucket/runs/a` are the objects whose names start with `runs/a/`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError, NotFound, StorageError, UsageError
from fusectl.system.given import read_local


# Sorts behind everything that may stand behind a prefix.
_LAST = "\U0010ffff"
URL = re.compile(r"((?i:gs|s3))://([^/]*)(?:/(.*))?", re.DOTALL)
_DRIVERS = {"gs": "gcs", "s3": "s3"}
# By default it would be minutes until a server that is gone is an error.
_RETRIES = {"max_retries": 8, "initial_delay": "200ms", "max_delay": "8s"}
CONTEXT = {"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES}


def bucket_spec(scheme: str, bucket: str, key: str) -> dict[str, Any]:
    """The store of the objects below a key. AWS_ENDPOINT_URL and AWS_REGION say where S3 is, as for other programs."""
    spec: dict[str, Any] = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{key}/" if key else ""}
    if scheme == "s3":
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            # What the default finds first; while it looks for the others, too, it writes to standard error.
            spec["aws_credentials"] = {"type": "environment"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = aws_region()
        if endpoint:
            spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
    return spec


def aws_region() -> str | None:
    """The region that the environment names."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def store_error(error: Exception, where: str, otherwise: type[FusectlError] = Corrupt) -> FusectlError:
    """The fusectl error for what an object store said at `where`; of the class `otherwise` if it tells no more."""
    text = str(error).split(" [")[0]
    status = text.split(":", 1)[0]
    if "NoSuchBucket" in text:
        return NotFound(f"{where}: no such bucket", details=(text,))
    if status in {"PERMISSION_DENIED", "UNAUTHENTICATED"} or "ExpiredToken" in text:
        hint = "credentials: GOOGLE_APPLICATION_CREDENTIALS for gs://, AWS_ACCESS_KEY_ID or AWS_PROFILE for s3://"
        return StorageError(f"{where}: storage refused", details=(text,), hint=hint)
    if status in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "INTERNAL", "CANCELLED"}:
        return StorageError(f"{where}: storage failed", details=(text,))
    return otherwise(f"{where}: cannot be read", details=(text,))


def bucket_of(path: str) -> tuple[str, str] | None:
    """The kind of store and the bucket that a URL leads into; None for a path on this machine.

    >>> bucket_of("gs://runs/a/20"), bucket_of("runs/a/20")
    (('gs', 'runs'), None)
    """
    found = URL.fullmatch(path)
    return (found.group(1).lower(), found.group(2)) if found else None


class _Bucket:
    """One bucket, and what has been listed in it: objects are asked for once while a checkpoint is looked for."""

    def __init__(self, scheme: str, name: str, held: dict[str, bytes] | None = None) -> None:
        self.scheme = scheme
        self.name = name
        # What is written only when it is published; until then it is read as if it were there.
        self.held = held
        self._spec = bucket_spec(scheme, name, "")
        self._listed: dict[str, frozenset[str]] = {}

    @cached_property
    def _store(self) -> ts.KvStore:
        return ts.KvStore.open(self._spec, context=ts.Context(CONTEXT)).result()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise store_error(error, f"{self.scheme}://{self.name}/{key}", StorageError) from error

    def below(self, prefix: str) -> frozenset[str]:
        """The names of all objects that start with a prefix."""
        held = frozenset(name for name in self.held or () if name.startswith(prefix))
        for known, names in self._listed.items():
            if prefix.startswith(known):
                return held | frozenset(name for name in names if name.startswith(prefix))
        with self._errors(prefix):
            keys = self._store.list(ts.KvStore.KeyRange(prefix, prefix + _LAST)).result()
        self._listed[prefix] = frozenset(key.decode() for key in keys)
        return held | self._listed[prefix]

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """The contents of an object, or None; and its generation."""
        if self.held and key in self.held:
            return self.held[key], b""
        with self._errors(key):
            found = self._store.read(key).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def head(self, key: str, nbytes: int) -> bytes:
        """The first bytes of an object; none of one that is not there."""
        if self.held and key in self.held:
            return self.held[key][:nbytes]
        try:
            return self._store.read(key, byte_range=slice(0, nbytes)).result().value
        except ValueError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise store_error(error, f"{self.scheme}://{self.name}/{key}", StorageError) from error
        # It has fewer.
        return self.read(key)[0] or b""

    def write(self, key: str, value: bytes | None, generation: bytes | None = None) -> bytes | None:
        """Writes an object, or deletes it, if it is of this generation; the new one, or None if it was another."""
        with self._errors(key):
            return self._store.write(key, value, if_equal=generation).result().generation or None

    def delete(self, key: str) -> None:
        """Deletes an object, if there is one, and all that are below it."""
        with self._errors(key):
            self._store.write(key, None).result()
            self._store.delete_range(ts.KvStore.KeyRange(f"{key}/", f"{key}/{_LAST}")).result()


@dataclass(frozen=True)
class ObjectPath:
    """`scheme://bucket/key`: an object, or what is below it."""

    scheme: str
    bucket: str
    key: str
    _objects: _Bucket = field(repr=False, compare=False)

    @classmethod
    def parse(cls, url: str) -> ObjectPath | None:
        """The path that a gs:// or s3:// URL means; None for anything else. Raises UsageError for a malformed one."""
        found = URL.fullmatch(url)
        if found is None:
            return None
        scheme, bucket, key = found.group(1).lower(), found.group(2), (found.group(3) or "").strip("/")
        if not bucket:
            raise UsageError(f"{url}: names no bucket", hint=f"{scheme}://BUCKET/PATH")
        if not {".", ".."}.isdisjoint(key.split("/")):
            # Servers resolve them, up to another bucket; who lists does not.
            raise UsageError(f"{url}: . and .. mean nothing in a bucket")
        return cls(scheme, bucket, key, _Bucket(scheme, bucket))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return self._at(f"{self.key}/{name}".strip("/"))

    def _at(self, key: str) -> ObjectPath:
        return ObjectPath(self.scheme, self.bucket, key, self._objects)

    def anew(self, held: dict[str, bytes] | None = None) -> ObjectPath:
        """The same place, listed anew, where `write_bytes` puts what it is given into `held` until `publish`."""
        return ObjectPath(self.scheme, self.bucket, self.key, _Bucket(self.scheme, self.bucket, held))

    @property
    def held(self) -> dict[str, bytes] | None:
        """What is held back below this path and others of its making, by key."""
        return self._objects.held

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    @property
    def parent(self) -> ObjectPath:
        return self._at(self.key.rpartition("/")[0])

    @property
    def parents(self) -> list[ObjectPath]:
        return [self.parent, *self.parent.parents] if self.key else []

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self.key) and self.key in self._objects.below(self.key)

    def is_dir(self) -> bool:
        return not self.key or bool(self._objects.below(f"{self.key}/"))

    def iterdir(self) -> Iterator[ObjectPath]:
        prefix = f"{self.key}/" if self.key else ""
        below = self._objects.below(prefix)
        return (self / name for name in sorted({key.removeprefix(prefix).partition("/")[0] for key in below}) if name)

    def files(self) -> list[str]:
        """The names of all objects below it, relative to it."""
        prefix = f"{self.key}/" if self.key else ""
        return [key.removeprefix(prefix) for key in self._objects.below(prefix)]

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        return (child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, pattern))

    def read_bytes(self) -> bytes:
        found, _ = self.read()
        if found is None:
            raise FileNotFoundError(str(self))
        return found

    def head(self, nbytes: int) -> bytes:
        """Its first bytes."""
        return self._objects.head(self.key, nbytes)

    def read(self) -> tuple[bytes | None, bytes]:
        """The contents of the object, or None; and its generation, which changes with every write."""
        return self._objects.read(self.key)

    def write_if(self, value: bytes | None, generation: bytes) -> bytes | None:
        """Writes the object, or deletes it, if it still is of a generation; the new one, or None."""
        return self._objects.write(self.key, value, generation)

    def write_bytes(self, value: bytes) -> None:
        if self._objects.held is not None:
            self._objects.held[self.key] = value
        else:
            self._objects.write(self.key, value)

    def publish(self, key: str) -> None:
        """Writes one of the objects that have been held back."""
        if self._objects.held is not None:
            self._objects.write(key, self._objects.held.pop(key))

    def remove(self) -> None:
        """Deletes the object, if there is one, and all that is below it."""
        self._objects.delete(self.key)


# Where a checkpoint, or a part of it, lies.
Place = Path | ObjectPath


def head(file: Place, nbytes: int) -> bytes:
    """The first bytes of a file; none of what is no regular one."""
    if not file.is_file():
        return b""
    if isinstance(file, ObjectPath):
        return file.head(nbytes)
    with file.open("rb") as opened:
        return opened.read(nbytes)


def read_small(file: Place, most_bytes: int, otherwise: type[FusectlError] = Corrupt) -> bytes:
    """The contents of a file; raises Corrupt, or `otherwise`, if it is none, or has more than `most_bytes`.

    Pipes and devices, which may have no end, are not read.
    """
    raw = read_local(file, most_bytes) if isinstance(file, Path) else file.read_bytes() if file.is_file() else None
    if raw is None:
        raise otherwise(f"{file}: not a file")
    size = raw if isinstance(raw, int) else len(raw)
    if isinstance(raw, int) or size > most_bytes:
        raise otherwise(f"{file}: {size:,} bytes, more than the {most_bytes:,} that it may have")
    return raw
