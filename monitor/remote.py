"""Object stores: S3 and Google and Azure storage through pyarrow.fs, anything else through fsspec."""

from __future__ import annotations

import contextlib
import importlib
import os
import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from .blocks import BlockFile, Blocks
from .errors import StoreError
from .store import INSIDE, Store

#: A connection that is not made, or a transfer that stands still for so long, has failed (seconds).
CONNECT_SECONDS, STALLED_SECONDS = 5.0, 15.0
ATTEMPTS = 2
_blocks = Blocks()
S3_OPTIONS = ("endpoint_override", "region", "scheme")
_CHUNK = 8 << 20
#: Error codes of S3 -> what to say. They do not pass by waiting.
_LASTING = {
    "NO_SUCH_BUCKET": "there is no such bucket: create it, or check its name",
    "INVALID_ACCESS_KEY_ID": "the access key is not known there: check AWS_ACCESS_KEY_ID or the profile",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY or the profile",
    "ACCESS_DENIED": "access is denied: check the credentials; they must allow to list, read, write, delete",
    "EXPIRED_TOKEN": "the credentials have expired: renew them",
    "INVALID_CLIENT_TOKEN_ID": "the credentials are not valid: check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN",
}


class Address(NamedTuple):
    """A URL such as `s3://bucket/exp1?region=eu-west-1`, taken apart."""

    scheme: str
    place: str  # bucket and prefix
    query: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises StoreError: a password is in it, or no bucket."""
        parts = urlsplit(url, allow_fragments=False)
        user, at, host = parts.netloc.rpartition("@")
        if ":" in user:
            raise StoreError(
                f"expected no credentials in the URL of {parts.scheme}://{host}{parts.path}: it is written "
                "down in many places; set them in the environment or in a profile"
            )
        if not host:
            raise StoreError(f"expected a URL such as s3://bucket/exp1, got {url!r}")
        return cls(parts.scheme, f"{user}{at}{host}{parts.path}".rstrip("/"), parts.query)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.place}" + (f"?{self.query}" if self.query else "")


class RemoteStore(Store):
    """A prefix of an object store. The listing is kept until `refresh`; one request brings 1,000 names.

    Raises:
        StoreError: the URL is not as expected, or no package for its scheme is installed.
    """

    path = None

    def __init__(self, address: Address, opened: tuple[fs.FileSystem, str] | None = None) -> None:
        self._address = address
        self.url, self.name = address.url, posixpath.basename(address.place)
        self._fs, self._root = opened or _open(address)
        self._listing: dict[str, dict[str, fs.FileInfo]] | None = None
        self._opened: dict[str, tuple[fs.FileInfo, pa.NativeFile]] = {}  # parts, connected to
        self._changes: dict[str, tuple[float | None, float]] = {}  # name -> time, when to ask again

    def at(self, folder: str) -> Store:
        if not folder:
            return self
        inner = self._address._replace(place=f"{self._address.place}/{folder}")
        return RemoteStore(inner, (self._fs, self._key(folder)))

    def refresh(self) -> None:
        self._listing = None

    def list(self, folder: str = "") -> dict[str, int]:
        return {name: info.size for name, info in self._all().get(folder, {}).items()}

    def tree(self, private: list[str] | None = None) -> dict[str, tuple[int, float]]:
        return {
            f"{folder}/{name}" if folder else name: (info.size, info.mtime_ns / 1e9 if info.mtime else 0.0)
            for folder, files in self._all().items()
            for name, info in files.items()
        }

    def _all(self) -> dict[str, dict[str, fs.FileInfo]]:
        """Folder -> file name -> what is known of it, of everything at or below this prefix."""
        if self._listing is None:
            listing: dict[str, dict[str, fs.FileInfo]] = {}
            for info in self._look():
                name = info.path[len(self._root) :].lstrip("/")
                if info.type == fs.FileType.File and not any(p.startswith(".") for p in name.split("/")):
                    folder, _, base = name.rpartition("/")
                    listing.setdefault(folder, {})[base] = info
            self._listing = listing
            return listing
        return self._listing

    def _look(self) -> Sequence[fs.FileInfo]:
        # With allow_not_found a missing bucket would be an empty one.
        with self._translated(), contextlib.suppress(FileNotFoundError):
            return self._fs.get_file_info(fs.FileSelector(self._root, recursive=True))
        return []

    def modified(self, name: str) -> float | None:
        """Asked again after 10 s, of what has not changed for long after a tenth of that time."""
        known, until = self._changes.get(name, (None, 0.0))
        now = time.time()
        if now >= until:
            known = self._changed(name)
            self._changes[name] = known, now + max(10.0, (now - known) / 10 if known else 60.0)
        return known

    def _changed(self, name: str) -> float | None:
        with self._translated():
            info = self._fs.get_file_info(self._key(name))
        return info.mtime.timestamp() if info.type == fs.FileType.File and info.mtime else None

    def read(self, name: str) -> bytes:
        try:
            with self._connected(name) as file:
                return file.read()
        except (OSError, pa.ArrowException) as error:
            raise self.explained(name, error) from None

    def open(self, name: str) -> pa.NativeFile:
        """Parts, which never change, are read in blocks that stay in memory."""
        folder, _, base = name.rpartition("/")
        info = self._all().get(folder, {}).get(base) if base.endswith(".parquet") else None
        if info is None:
            return self._connected(name)
        content = (self.url, name, info.size, info.mtime_ns)
        part = BlockFile(content, info.size, lambda: self._once_connected(name, info), _blocks)
        return pa.PythonFile(part, mode="r")

    def _connected(self, name: str) -> pa.NativeFile:
        with self._translated():
            return self._fs.open_input_file(self._key(name))

    def _once_connected(self, name: str, info: fs.FileInfo) -> pa.NativeFile:
        known = self._opened.get(name)
        if known is None or known[0] != info:
            known = self._opened[name] = info, self._connected(name)
        return known[1]

    def folders_with(self, name: str) -> list[str]:
        found: list[str] = []
        for folder in sorted(f for f, files in self._all().items() if name in files):
            inside = any(
                folder.startswith(f"{run}/{table}/") or folder == f"{run}/{table}"
                for run in found
                for table in INSIDE
            )
            if not inside:
                found.append(folder)
        return found

    def explained(self, name: str, error: Exception) -> Exception:
        if isinstance(error, StoreError | FileNotFoundError):
            return error
        try:
            there = self._changed(name) is not None
        except StoreError as fault:
            return fault
        if not there:
            return FileNotFoundError(f"{self.url} holds no {name} any more")
        return self._fault(error) if "AWS Error" in str(error) else error

    def put(self, name: str, content: bytes | Path) -> None:
        with contextlib.ExitStack() as closing:
            source = closing.enter_context(content.open("rb")) if isinstance(content, Path) else None
            with self._translated(), self._fs.open_output_stream(self._key(name)) as stream:
                if source is None:
                    stream.write(content)
                else:
                    while chunk := source.read(_CHUNK):
                        stream.write(chunk)

    def remove(self, name: str) -> None:
        """Delete a file; none is fine."""
        with self._translated(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # fsspec's drivers raise what their libraries do
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> StoreError:
        code = re.search(r"AWS Error (\w+)", str(error))
        if code and code[1] in _LASTING:
            return StoreError(f"{self.url} cannot be used: {_LASTING[code[1]]}", lasting=True)
        return StoreError(f"{self.url} cannot be reached: {' '.join(str(error).split())[:300]}")


def _open(address: Address) -> tuple[fs.FileSystem, str]:
    """The file system, and where in it the prefix lies."""
    try:
        if address.scheme == "s3":
            return _s3(address), address.place
        if address.scheme in ("gs", "gcs", "abfs", "abfss"):
            found, root = fs.FileSystem.from_uri(address.url)
        else:
            found, root = _fsspec(address)
        return found, root.rstrip("/")
    except StoreError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        raise StoreError(f"{address.url} cannot be used: {' '.join(str(error).split())}") from None


def _s3(address: Address) -> fs.FileSystem:
    """Environment and profile are read by the AWS library; here is what it leaves out, and what bounds it."""
    options = dict(parse_qsl(address.query))
    if unknown := set(options) - set(S3_OPTIONS):
        raise StoreError(f"expected options among {', '.join(S3_OPTIONS)} in {address.url}, got {unknown}")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    scheme, _, host = endpoint.rpartition("://")
    endpoint = options.get("endpoint_override") or host.rstrip("/") or None
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        with contextlib.suppress(OSError):  # offline, say: the first request tells
            region = fs.resolve_s3_region(address.place.partition("/")[0])
    given: dict[str, Any] = {
        "region": region,
        "endpoint_override": endpoint,
        "scheme": options.get("scheme") or scheme or "https",
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": STALLED_SECONDS,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        "background_writes": False,  # an error is raised where it happens, and little is kept in memory
    }
    try:  # a small file takes one request, not three
        return fs.S3FileSystem(**given, allow_delayed_open=True)
    except TypeError:  # an older pyarrow
        return fs.S3FileSystem(**given)


def _fsspec(address: Address) -> tuple[fs.FileSystem, str]:
    try:
        core = importlib.import_module("fsspec.core")
        found, root = core.url_to_fs(address.url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StoreError(
            "expected a URL of s3://, gs://, abfs:// or a scheme that fsspec knows, "
            f"got {address.url}: {error}"
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(found)), root
