"""Byte ranges of objects at URLs of http(s), s3 and gs, through obstore; credentials from its environment variables.

A broken transfer is continued from the byte it reached, and all bytes of a range come from one version of the object.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import PreconditionError
from obstore.store import GCSStore, HTTPStore, S3Store

from pretrain.errors import InputError
from pretrain.storage import retry
from pretrain.storage.retry import CREDENTIALS, Retry, ShortBody, Timeouts

_REMOTE = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)
_HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?")
_BUCKET = re.compile(r"[\w.-]+")
_seen: dict[str, Stat] = {}  # by URL: the version first seen of objects whose etag no index tells


@dataclass(frozen=True)
class Extent:
    """Bytes [begin, end) of one shard, a path or URL.

    `etag` and `size` are those of the shard when it was indexed; empty and 0 where none was recorded.
    """

    url: str
    begin: int
    end: int
    etag: str = ""
    size: int = 0

    def __str__(self) -> str:
        return f"{self.url}: bytes {self.begin}-{self.end}"


@dataclass(frozen=True)
class Stat:
    """What distinguishes versions of an object; etag is empty and modified None where the server tells none."""

    size: int
    etag: str
    modified: datetime | None = None

    def difference(self, other: Stat) -> str | None:
        """How `other` differs, in words; None where they may be one version."""
        if self.size != other.size:
            return f"{other.size} bytes, not {self.size}"
        if self.etag and other.etag:
            return None if same_etag(self.etag, other.etag) else f"etag {other.etag}, not {self.etag}"
        if self.modified and other.modified and self.modified != other.modified:
            return f"modified {other.modified:%Y-%m-%d %H:%M:%S}, not {self.modified:%Y-%m-%d %H:%M:%S}"
        return None


def same_etag(one: str, other: str) -> bool:
    """Whether two etags name one version; weak ones (`W/"…"`) count by their content."""
    return one.removeprefix("W/") == other.removeprefix("W/")


@dataclass(frozen=True)
class _Object:
    scheme: str
    root: str  # host with port, or bucket
    name: str

    @property
    def in_bucket(self) -> bool:
        return self.scheme in CREDENTIALS

    def request(
        self, name: str, timeouts: Timeouts | None, stop: threading.Event | None = None, *, first: bool = False
    ) -> tuple[Any, Retry]:
        """The library's client, and the attempts at a request that errors call `name`; see `Retry`."""
        timeouts = timeouts or retry.TIMEOUTS
        client = _client(self.scheme, self.root, timeouts)
        return client, Retry(name, self.scheme, self.root, timeouts, stop, first=first)


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Whether this is a URL of an object store: http, https, s3 or gs."""
    return _REMOTE.match(os.fspath(url)) is not None


def in_bucket(url: str) -> bool:
    """Whether a remote URL lies in a bucket (s3, gs), whose folders can be listed."""
    return _parsed(url).in_bucket


def object_name(url: str) -> str:
    """The last part of an object's name, as a file would be called."""
    return _parsed(url).name.rpartition("/")[2]


def url_under(folder: str, name: str) -> str:
    """The URL of the object called `name` right under the folder at a URL."""
    url = f"{folder.rstrip('/')}/{name if in_bucket(folder) else quote(name)}"
    check_url(url)
    return url


def check_url(url: str) -> None:
    """Raise InputError where `url` names no object, or carries a user, password, or query string (a signed URL)."""
    _parsed(url)


def _parsed(url: str) -> _Object:
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    root, _, name = rest.partition("/")
    if "@" in root:
        raise InputError(
            f"{scheme}://…@{root.rpartition('@')[2]}/{name.partition('?')[0]}: a user or password in a URL is refused; "
            "write the URL without it"
        )
    if "?" in rest:
        raise InputError(
            f"{url.partition('?')[0]}?…: a query string is refused (a signed URL would be stored, and expires); "
            "private objects are read as s3:// or gs://, with credentials from the environment"
        )
    if not (_BUCKET if scheme in CREDENTIALS else _HOST).fullmatch(root):
        what = "bucket" if scheme in CREDENTIALS else "host, or host:port,"
        raise InputError(f"{scheme}://…: no {what} behind the ://; e.g. s3://bucket/train/shard-000000.tar")
    if scheme not in CREDENTIALS:
        if "#" in name:
            raise InputError(f"{url.partition('#')[0]}#…: a fragment; a # in a name is written %23")
        name = unquote(name)
    parts = name.removesuffix("/").split("/")
    odd = any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in name)
    if odd or (name and not {"", ".", ".."}.isdisjoint(parts)):
        raise InputError(f"{url!r}: empty, '.' and '..' parts, control characters and names not in UTF-8 are refused")
    return _Object(scheme, root, name)


def stat(url: str, timeouts: Timeouts | None = None, stop: threading.Event | None = None) -> Stat:
    """Size and etag of an object, by HEAD. Raises InputError where it is missing or refused; StorageError for now."""
    target = _object(url)
    client, attempts = target.request(url, timeouts, stop, first=True)
    return _stat(attempts.run(lambda: obstore.head(client, target.name)))


def list_shards(folder: str, timeouts: Timeouts | None = None) -> list[str]:
    """URLs of the *.tar right under an s3:// or gs:// folder, in name order.

    Raises InputError where it cannot be listed; an http folder never can.
    """
    target = _parsed(folder)
    if not target.in_bucket:
        raise InputError(
            f"{folder}: a folder cannot be listed over {target.scheme}; name its shards, e.g. "
            f"{folder.rstrip('/')}/shard-{{000000..000099}}.tar"
        )
    client, attempts = target.request(f"{folder}: its list", timeouts, first=True)
    found = attempts.run(lambda: obstore.list_with_delimiter(client, target.name or None))
    names = sorted(meta["path"] for meta in found["objects"])
    shards = [name for name in names if name.endswith(".tar") and not name.rpartition("/")[2].startswith(".")]
    return [f"{target.scheme}://{target.root}/{name}" for name in shards]


def read_range(
    extent: Extent,
    version: Stat | None = None,
    timeouts: Timeouts | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """All bytes of an extent, of one version of the object.

    That is the version with the extent's etag and size; where no etag is known, `version`, or else what this process
    saw of the object first. A broken transfer continues from the byte it reached if a strong etag tells the versions
    apart, and begins again if none does.

    Raises InputError where the object is missing, changed or too short; StorageError once the deadline has passed;
    CancelledError soon after `stop` is set.
    """
    target, end = _object(extent.url), extent.end
    client, attempts = target.request(str(extent), timeouts, stop)
    pieces: list[bytes] = []
    at = extent.begin
    if not extent.etag and version is None:
        version = _seen.get(extent.url)

    def attempt() -> bytes:
        nonlocal at, version
        if at < end:
            if pieces and version is not None and (not version.etag or version.etag.startswith("W/")):
                pieces.clear()
                at = extent.begin
            tag = extent.etag or (version.etag if version else "")
            options: Any = {"range": (at, end)}
            if tag and not tag.startswith("W/"):  # If-Match compares strongly: a weak one never matches
                options["if_match"] = tag
            try:
                answer = obstore.get(client, target.name, options=options)
            except PreconditionError:
                raise _changed(extent, f"its etag is no longer {tag}", indexed=bool(extent.etag)) from None
            version = _checked(extent, _stat(answer.meta), version)
            if answer.range != (at, end):
                raise InputError(
                    f"{extent.url}: truncated: bytes {extent.begin}-{end} are asked for, it has "
                    f"{version.size}; copy or write the shard again"
                )
            for piece in answer.stream(min_chunk_size=1):  # as it arrives: what is gathered is lost in a break
                pieces.append(piece)
                at += len(piece)
                attempts.arrived()
                if at > end:
                    raise InputError(f"{extent}: more bytes came than were asked for")
            if at < end:
                raise ShortBody(f"the body ended at byte {at}")
        return b"".join(pieces)

    return attempts.run(attempt) if at < end else b""


def _checked(extent: Extent, found: Stat, version: Stat | None) -> Stat:
    """The version of an answer. Raises InputError where it is not the one indexed, or the one seen before."""
    if extent.etag and not found.etag:
        raise InputError(
            f"{extent.url}: its server tells no etag, the index has one ({extent.etag}): whether this is what was "
            "indexed cannot be told; index it again, from this server, and start a new run"
        )
    if extent.etag and not same_etag(extent.etag, found.etag):
        raise _changed(extent, f"etag {found.etag}, not {extent.etag}", indexed=True)
    if extent.size and found.size > extent.size:
        raise _changed(extent, f"{found.size} bytes, not {extent.size}", indexed=True)
    if not extent.etag:  # of several threads that see it for the first time, one was first
        version = version or _seen.setdefault(extent.url, found)
    difference = version.difference(found) if version else None
    if difference:
        raise _changed(extent, difference, indexed=False)
    return found


def _object(url: str) -> _Object:
    target = _parsed(url)
    if not target.name or target.name.endswith("/"):
        raise InputError(f"{url}: names a folder, not a shard")
    return target


def _stat(meta: Any) -> Stat:
    modified = meta["last_modified"]
    return Stat(meta["size"], meta["e_tag"] or "", modified if modified.timestamp() > 0 else None)


def _changed(extent: Extent, how: str, *, indexed: bool) -> InputError:
    when = "since it was indexed" if indexed else "while it was read"
    return InputError(f"{extent.url}: changed {when}: {how}; restore it, or index it again and start a new run")


_clients: dict[tuple[str, str, Timeouts], Any] = {}
_clients_lock = threading.Lock()


def _client(scheme: str, root: str, timeouts: Timeouts) -> Any:
    """The one client of a host or bucket in this process; its connections are shared by all threads."""
    with _clients_lock:
        key = scheme, root, timeouts
        if key not in _clients:
            _clients[key] = _connect(*key)
        return _clients[key]


def _connect(scheme: str, root: str, timeouts: Timeouts) -> Any:
    options: dict[str, Any] = {
        name: f"{round(1000 * seconds)}ms"
        for name, seconds in (
            ("connect_timeout", timeouts.connect),
            ("read_timeout", timeouts.stall),
            ("timeout", timeouts.deadline),
        )
    }
    settings: dict[str, Any] = {
        "client_options": options,
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(0)},
    }
    if scheme in CREDENTIALS:
        name = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP"}[scheme]
        options["allow_http"] = os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        return (S3Store if scheme == "s3" else GCSStore)(root, **settings)
    options["allow_http"] = scheme == "http"
    return HTTPStore(f"{scheme}://{root}/", **settings)
