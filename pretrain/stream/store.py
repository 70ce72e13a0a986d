"""Bytes of shards in object stores: http(s), s3 and gs, through obstore.

Its own retries are off: they begin a broken transfer anew. Here a range goes on from the byte it reached, all of
its bytes come from one version of the object, and what ended it is told without what the library says, since
that can hold request details. Credentials come from the library's environment variables alone (AWS_*, GOOGLE_*).
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PreconditionError
from obstore.store import GCSStore, HTTPStore, S3Store

from pretrain.errors import InputError, StorageError

_REMOTE = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)
_HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?")
_BUCKET = re.compile(r"[\w.-]+")
_CREDENTIALS = {
    "s3": "the AWS_* variables of the environment or the machine's role (public bucket: AWS_SKIP_SIGNATURE=true)",
    "gs": "the GOOGLE_* variables of the environment or the machine's role (public bucket: GOOGLE_SKIP_SIGNATURE=true)",
}
_LATER = (408, 429)  # like all of 5xx: worth another attempt
_WORTH_A_WORD = 10.0  # seconds without success
# A name that nothing has been found under yet may be mistyped; a later one has only gone away.
_UNKNOWN, _NEW_NAME = "host not found", 20.0

_log = logging.getLogger(__name__)
_found: set[str] = set()  # hosts and buckets that have answered
_seen: dict[str, Stat] = {}  # by URL: objects whose etag no index tells
_jitter = random.Random()  # its own: a run's seed would give all ranks the same pauses

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds: for a connection, for the next bytes, and for one range over all attempts.

    The pause before attempt k+2 is drawn from 0 … min(first_backoff·2^k, most_backoff); k starts again once
    bytes arrive.
    """

    connect: float = 10.0
    stall: float = 30.0
    deadline: float = 300.0
    first_backoff: float = 0.2
    most_backoff: float = 20.0


PATIENCE = Patience()


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
        return self.scheme in _CREDENTIALS


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
    if not (_BUCKET if scheme in _CREDENTIALS else _HOST).fullmatch(root):
        what = "bucket" if scheme in _CREDENTIALS else "host, or host:port,"
        raise InputError(f"{scheme}://…: no {what} behind the ://; e.g. s3://bucket/train/shard-000000.tar")
    if scheme not in _CREDENTIALS:
        if "#" in name:
            raise InputError(f"{url.partition('#')[0]}#…: a fragment; a # in a name is written %23")
        name = unquote(name)
    parts = name.removesuffix("/").split("/")
    odd = any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in name)
    if odd or (name and not {"", ".", ".."}.isdisjoint(parts)):
        raise InputError(f"{url!r}: empty, '.' and '..' parts, control characters and names not in UTF-8 are refused")
    return _Place(scheme, root, name)


def stat(url: str, patience: Patience | None = None, stop: threading.Event | None = None) -> Stat:
    """Size and etag of an object, by HEAD.

    Raises InputError when it is missing or cannot be asked for; StorageError when that may pass.
    """
    place = _object(url)
    effort = _Effort(url, place, "", patience, stop, asked=True)
    return _stat(effort.run(lambda: obstore.head(effort.client(), place.name)))


def list_shards(folder: str, patience: Patience | None = None) -> list[str]:
    """URLs of the *.tar right under an s3:// or gs:// folder, in name order.

    Raises InputError where it cannot be listed; an http folder never can.
    """
    place = _place(folder)
    if not place.in_bucket:
        raise InputError(
            f"{folder}: a folder cannot be listed over {place.scheme}; name its shards, e.g. "
            f"{folder.rstrip('/')}/shard-{{000000..000099}}.tar"
        )
    effort = _Effort(folder, place, "its list", patience, None, asked=True)
    found = effort.run(lambda: obstore.list_with_delimiter(effort.client(), place.name or None))
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
    patience: Patience | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """Bytes [begin, end) of an object: all of them, of one version, or an error.

    `etag` and `size` (0: not known) are what was indexed, `version` what is expected besides; without an etag, what
    this process saw of the object first is expected. A broken transfer goes on from the byte it reached if a strong
    etag tells that it is of one version, and begins anew if none does. Raises InputError where the object is missing,
    changed or too short, and once `patience` is at an end (StorageError: that may pass); CancelledError soon after
    `stop` is set.
    """
    place = _object(url)
    effort = _Effort(url, place, f"bytes {begin}-{end}", patience, stop, asked=False)
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
            answer = obstore.get(effort.client(), place.name, options=options)
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
            effort.arrived()
            if at > end:
                raise InputError(f"{url}: bytes {begin}-{end}: more bytes came than were asked for")
        if at < end:
            raise _ShortBody(f"the body ended at byte {at}")
        return b"".join(pieces)

    return effort.run(attempt) if begin < end else b""


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


class _ShortBody(ConnectionError):
    """A body that ends, without an error of the transport, before its last byte."""


class _Effort:
    """The attempts at one request, and what is said of them in the end."""

    def __init__(
        self, url: str, place: _Place, what: str, patience: Patience | None, stop: threading.Event | None, asked: bool
    ) -> None:
        """`asked`: it is the first that is asked of an object, whose host may be mistyped."""
        self._subject = f"{url}: {what}" if what else url
        self._place, self._patience, self._stop, self._asked = place, patience or PATIENCE, stop, asked
        self._begun = time.monotonic()
        self._attempts = 0
        self._fruitless = 0  # attempts since bytes came last
        self._told = False

    def client(self) -> Any:
        return _client(self._place.scheme, self._place.root, self._patience)

    def run(self, attempt: Callable[[], Result]) -> Result:
        while True:
            self._attempts += 1
            try:
                result = attempt()
                _found.add(self._place.root)
                return result
            except (BaseError, OSError, ValueError) as error:
                reason, lasting = _diagnose(error, self._place.scheme)
            # Outside the handler: the library's error, whose text may tell too much, is not chained.
            if lasting:
                raise InputError(f"{self._subject}: {reason}")
            if reason != _UNKNOWN:
                _found.add(self._place.root)
            self._pause(reason)

    def arrived(self) -> None:
        """Bytes came."""
        self._fruitless = 0
        if self._stop is not None and self._stop.is_set():
            raise CancelledError
        if time.monotonic() - self._begun > self._patience.deadline:
            self._give_up("too slow: bytes still arrive")

    def _pause(self, reason: str) -> None:
        longest = min(self._patience.first_backoff * 2 ** min(self._fruitless, 32), self._patience.most_backoff)
        pause = _jitter.uniform(0, longest)
        self._fruitless += 1
        spent = time.monotonic() - self._begun
        # Only where a person waits for the answer: while samples are read, a name that is not found has gone away.
        new = self._asked and self._place.root not in _found
        if spent + pause >= (min(_NEW_NAME, self._patience.deadline) if new else self._patience.deadline):
            self._give_up(reason, passing=not new)
        if spent > _WORTH_A_WORD and not self._told:
            self._told = True
            _log.warning("%s: %s; attempts go on, %g s in all", self._subject, reason, self._patience.deadline)
        if (self._stop or threading.Event()).wait(pause):
            raise CancelledError

    def _give_up(self, reason: str, passing: bool = True) -> None:
        tries = "1 attempt" if self._attempts == 1 else f"{self._attempts} attempts"
        seconds = time.monotonic() - self._begun
        text = f"{self._subject}: cannot be read: {reason}; given up after {tries} in {seconds:.1f} s"
        raise StorageError(text) if passing else InputError(text)


_TRANSPORT = (  # words in the library's account of a broken transport -> what is told of it, whether for good
    ("BadScheme", "its endpoint is plain http; AWS_ALLOW_HTTP=true or GOOGLE_ALLOW_HTTP=true permits that", True),
    ("InvalidCertificate", "the server's TLS certificate is not trusted", True),
    ("InvalidContentType", "the server does not speak TLS; http:// would be right", True),
    ("dns error", _UNKNOWN, False),
    ("ConnectionRefused", "connection refused", False),
    ("ConnectionReset", "connection reset", False),
    ("kind: Timeout", "timed out", False),
)


def _diagnose(error: Exception, scheme: str) -> tuple[str, bool]:
    """What an error means, in words of our own, and whether another attempt is useless."""
    if isinstance(error, _ShortBody):
        return str(error), False
    text = str(error)
    hint = f"; credentials come from {_CREDENTIALS[scheme]}" if scheme in _CREDENTIALS else ""
    status = re.search(r"non-2xx status code: (\d{3})", text)
    code = int(status[1]) if status else 0
    if "http://169.254." in text.partition("\n")[0]:  # the machine's own service that hands out credentials
        return f"no credentials{hint}", 0 < code < 500 and code not in _LATER
    if code:
        phrase = HTTPStatus(code).phrase if code in HTTPStatus._value2member_map_ else ""
        known = {401: hint, 403: hint, 416: ": it ends before these bytes"}.get(code, "")
        return f"{code} {phrase}".strip() + known, code < 500 and code not in _LATER
    if isinstance(error, FileNotFoundError):
        return "no such object", True
    if isinstance(error, NotSupportedError):
        return "the server does not serve byte ranges (it answers with the whole object)", True
    asked = re.search(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)", text)
    if asked:
        return f"the server answered with bytes {asked[3]}-{asked[4]} where {asked[1]}-{asked[2]} were asked for", True
    if "BareRedirect" in text:
        return "redirected to nowhere (for s3://, AWS_REGION has to name the bucket's region)", True
    if "HttpError" in text:
        account = text.partition("HttpError")[2]
        for word, reason, lasting in _TRANSPORT:
            if word in account:
                return reason, lasting
        return "the connection broke", False
    kinds = re.findall(r"\b([A-Z]\w+) \{", text.partition("Debug source:")[2])
    return f"not understood ({', '.join([type(error).__name__, *kinds[-1:]])}){hint}", True


_clients: dict[tuple[str, str, Patience], Any] = {}
_clients_lock = threading.Lock()


def _client(scheme: str, root: str, patience: Patience) -> Any:
    """The one client of a host or bucket in this process; its connections are shared by all threads."""
    with _clients_lock:
        key = scheme, root, patience
        if key not in _clients:
            _clients[key] = _connect(*key)
        return _clients[key]


def _connect(scheme: str, root: str, patience: Patience) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": _duration(patience.connect),
        "read_timeout": _duration(patience.stall),
        "timeout": _duration(patience.deadline),
    }
    settings: dict[str, Any] = {
        "client_options": options,
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(0)},
    }
    if scheme in _CREDENTIALS:
        name = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP"}[scheme]
        options["allow_http"] = os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        return (S3Store if scheme == "s3" else GCSStore)(root, **settings)
    options["allow_http"] = scheme == "http"
    return HTTPStore(f"{scheme}://{root}/", **settings)


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"
