"""Bytes of shards in object stores: http(s), s3 and gs, through obstore.

A range goes on from the byte that a broken transfer reached, and all of its bytes come from one version of the object.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import PreconditionError

from pretrain.errors import InputError
from pretrain.storage.retry import CREDENTIALS, Retry, ShortBody, Timeouts

_REMOTE = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)
_HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?")
_BUCKET = re.compile(r"[\w.-]+")
_seen: dict[str, Stat] = {}  # by URL: objects whose etag no index tells


@dataclass(frozen=True)
class Stat:
    """What tells one version of an object from another; etag empty, modified None where the server has none."""

    size: int
    etag: str
    modified: datetime | None = None

    def difference(self, other: Stat) -> str | None:
        """What `other` has that this has not; None where they may be one version."""
        if self.size != other.size:
            return f"{other.size} bytes, not {self.size}"
        if self.etag and other.etag:
            return None if same_etag(self.etag, other.etag) else f"etag {other.etag}, not {self.etag}"
        if self.modified and other.modified and self.modified != other.modified:
            return f"modified {other.modified:%Y-%m-%d %H:%M:%S}, not {self.modified:%Y-%m-%d %H:%M:%S}"
        return None


def same_etag(one: str, other: str) -> bool:
    """Whether two etags name one version; weak ones (`W/"…"`) count by what they hold."""
    return one.removeprefix("W/") == other.removeprefix("W/")


@dataclass(frozen=True)
class _Place:
    scheme: str
    root: str  # host with port, or bucket
    name: str

    @property
    def in_bucket(self) -> bool:
        return self.scheme in CREDENTIALS


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Whether this is a URL of an object store: http, https, s3 or gs."""
    return _REMOTE.match(os.fspath(url)) is not None


def in_bucket(url: str) -> bool:
    """Whether a remote URL lies in a bucket (s3, gs), whose folders can be listed."""
    return _place(url).in_bucket


def object_name(url: str) -> str:
    """The last part of an object's name, as a file would be called."""
    return _place(url).name.rpartition("/")[2]


def url_under(folder: str, name: str) -> str:
    """The URL of the object called `name` right under the folder at a URL."""
    url = f"{folder.rstrip('/')}/{name if in_bucket(folder) else quote(name)}"
    check_url(url)
    return url


def check_url(url: str) -> None:
    """Raise InputError where `url` names no object, or carries a user, password, or query string (a signed URL)."""
    _place(url)


def _place(url: str) -> _Place:
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
    return _Place(scheme, root, name)


def stat(url: str, timeouts: Timeouts | None = None, stop: threading.Event | None = None) -> Stat:
    """Size and etag of an object, by HEAD.

    Raises InputError when it is missing or cannot be asked for; StorageError when that may pass.
    """
    place = _object(url)
    retry = Retry(url, place.scheme, place.root, timeouts, stop, asked=True)
    return _stat(retry.run(lambda: obstore.head(retry.client(), place.name)))


def list_shards(folder: str, timeouts: Timeouts | None = None) -> list[str]:
    """URLs of the *.tar right under an s3:// or gs:// folder, in name order.

    Raises InputError where it cannot be listed; an http folder never can.
    """
    place = _place(folder)
    if not place.in_bucket:
        raise InputError(
            f"{folder}: a folder cannot be listed over {place.scheme}; name its shards, e.g. "
            f"{folder.rstrip('/')}/shard-{{000000..000099}}.tar"
        )
    retry = Retry(f"{folder}: its list", place.scheme, place.root, timeouts, asked=True)
    found = retry.run(lambda: obstore.list_with_delimiter(retry.client(), place.name or None))
    names = sorted(meta["path"] for meta in found["objects"])
    shards = [name for name in names if name.endswith(".tar") and not name.rpartition("/")[2].startswith(".")]
    return [f"{place.scheme}://{place.root}/{name}" for name in shards]


def read_range(
    url: str,
    begin: int,
    end: int,
    etag: str = "",
    size: int = 0,
    *,
    version: Stat | None = None,
    timeouts: Timeouts | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """Bytes [begin, end) of an object: all of them, of one version, or an error.

    `etag` and `size` (0: not known) are what was indexed, `version` what is expected besides; without an etag, what
    this process saw of the object first is expected. A broken transfer goes on from the byte it reached if a strong
    etag tells that it is of one version, and begins anew if none does. Raises InputError where the object is missing,
    changed or too short, and once the deadline has passed (StorageError: that may pass); CancelledError soon after
    `stop` is set.
    """
    place = _object(url)
    retry = Retry(f"{url}: bytes {begin}-{end}", place.scheme, place.root, timeouts, stop, asked=False)
    pieces: list[bytes] = []
    at = begin
    if not etag and version is None:
        version = _seen.get(url)

    def attempt() -> bytes:
        nonlocal at, version
        if at == end:
            return b"".join(pieces)
        if pieces and version is not None and (not version.etag or version.etag.startswith("W/")):
            pieces.clear()
            at = begin
        tag = etag or (version.etag if version else "")
        options: Any = {"range": (at, end)}
        if tag and not tag.startswith("W/"):  # If-Match compares strongly: a weak one never matches
            options["if_match"] = tag
        try:
            answer = obstore.get(retry.client(), place.name, options=options)
        except PreconditionError:
            raise _changed(url, f"its etag is no longer {tag}", indexed=bool(etag)) from None
        found = _stat(answer.meta)
        if etag and not found.etag:
            raise InputError(
                f"{url}: its server tells no etag, the index has one ({etag}): whether this is what was indexed cannot "
                "be told; index it again, from this server, and start a new run"
            )
        if etag and not same_etag(etag, found.etag):
            raise _changed(url, f"etag {found.etag}, not {etag}", indexed=True)
        if size and found.size > size:
            raise _changed(url, f"{found.size} bytes, not {size}", indexed=True)
        if not etag:  # of several threads that see it for the first time, one was first
            version = version or _seen.setdefault(url, found)
        difference = version.difference(found) if version else None
        if difference:
            raise _changed(url, difference, indexed=False)
        version = found
        if answer.range != (at, end):
            raise InputError(
                f"{url}: truncated: bytes {begin}-{end} are asked for, it has {found.size}; copy or write the shard "
                "again"
            )
        for piece in answer.stream(min_chunk_size=1):  # as it comes: what is gathered is lost in a break
            pieces.append(piece)
            at += len(piece)
            retry.arrived()
            if at > end:
                raise InputError(f"{url}: bytes {begin}-{end}: more bytes came than were asked for")
        if at < end:
            raise ShortBody(f"the body ended at byte {at}")
        return b"".join(pieces)

    return retry.run(attempt) if begin < end else b""


def _object(url: str) -> _Place:
    place = _place(url)
    if not place.name or place.name.endswith("/"):
        raise InputError(f"{url}: names a folder, not a shard")
    return place


def _stat(meta: Any) -> Stat:
    modified = meta["last_modified"]
    return Stat(meta["size"], meta["e_tag"] or "", modified if modified.timestamp() > 0 else None)


def _changed(url: str, how: str, *, indexed: bool) -> InputError:
    when = "since it was indexed" if indexed else "while it was read"
    return InputError(f"{url}: changed {when}: {how}; restore it, or index it again and start a new run")
