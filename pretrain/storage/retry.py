"""The attempts at one request to an object store: how long they go on, and what is said of them in the end.

The library's own retries are off: they begin a broken transfer anew. What ended an attempt is told without what the
library says, since that can hold request details. Credentials come from its environment variables alone (AWS_*,
GOOGLE_*).
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
from datetime import timedelta
from http import HTTPStatus
from typing import Any, TypeVar

from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import GCSStore, HTTPStore, S3Store

from pretrain.errors import InputError, StorageError

CREDENTIALS = {
    "s3": "the AWS_* variables of the environment or the machine's role (public bucket: AWS_SKIP_SIGNATURE=true)",
    "gs": "the GOOGLE_* variables of the environment or the machine's role (public bucket: GOOGLE_SKIP_SIGNATURE=true)",
}
_LATER = (408, 429)  # like all of 5xx: worth another attempt
_WORTH_A_WORD = 10.0  # seconds without success
# A name that nothing has been found under yet may be mistyped; a later one has only gone away.
_UNKNOWN, _NEW_NAME = "host not found", 20.0

_log = logging.getLogger(__name__)
_found: set[str] = set()  # hosts and buckets that have answered
_jitter = random.Random()  # its own: a run's seed would give all ranks the same pauses

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timeouts:
    """How long is waited, in seconds: for a connection, for the next bytes, and for one range over all attempts.

    The pause before attempt k+2 is drawn from 0 … min(first_backoff·2^k, most_backoff); k starts again once
    bytes arrive.
    """

    connect: float = 10.0
    stall: float = 30.0
    deadline: float = 300.0
    first_backoff: float = 0.2
    most_backoff: float = 20.0


TIMEOUTS = Timeouts()


class ShortBody(ConnectionError):
    """A body that ends, without an error of the transport, before its last byte."""


class Retry:
    """The attempts at one request, and what is said of them in the end."""

    def __init__(
        self,
        subject: str,
        scheme: str,
        root: str,
        timeouts: Timeouts | None = None,
        stop: threading.Event | None = None,
        *,
        asked: bool,
    ) -> None:
        """
        Args:
            subject: what is asked for, as errors name it.
            scheme: http, https, s3 or gs.
            root: host with port, or bucket.
            stop: an event that ends the waiting with CancelledError.
            asked: it is the first that is asked of an object, whose host may be mistyped.
        """
        self._subject, self._scheme, self._root = subject, scheme, root
        self._timeouts, self._stop, self._asked = timeouts or TIMEOUTS, stop, asked
        self._begun = time.monotonic()
        self._attempts = 0
        self._fruitless = 0  # attempts since bytes came last
        self._told = False

    def client(self) -> Any:
        """The library's store for the host or bucket."""
        return _client(self._scheme, self._root, self._timeouts)

    def run(self, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns, asked again while that may help.

        Raises InputError where it cannot, StorageError once the deadline has passed.
        """
        while True:
            self._attempts += 1
            try:
                result = attempt()
                _found.add(self._root)
                return result
            except (BaseError, OSError, ValueError) as error:
                reason, lasting = _diagnose(error, self._scheme)
            # Outside the handler: the library's error, whose text may tell too much, is not chained.
            if lasting:
                raise InputError(f"{self._subject}: {reason}")
            if reason != _UNKNOWN:
                _found.add(self._root)
            self._pause(reason)

    def arrived(self) -> None:
        """Bytes came."""
        self._fruitless = 0
        if self._stop is not None and self._stop.is_set():
            raise CancelledError
        if time.monotonic() - self._begun > self._timeouts.deadline:
            self._give_up("too slow: bytes still arrive")

    def _pause(self, reason: str) -> None:
        longest = min(self._timeouts.first_backoff * 2 ** min(self._fruitless, 32), self._timeouts.most_backoff)
        pause = _jitter.uniform(0, longest)
        self._fruitless += 1
        spent = time.monotonic() - self._begun
        # Only where a person waits for the answer: while samples are read, a name that is not found has gone away.
        new = self._asked and self._root not in _found
        if spent + pause >= (min(_NEW_NAME, self._timeouts.deadline) if new else self._timeouts.deadline):
            self._give_up(reason, passing=not new)
        if spent > _WORTH_A_WORD and not self._told:
            self._told = True
            _log.warning("%s: %s; attempts go on, %g s in all", self._subject, reason, self._timeouts.deadline)
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
    ("TooManyRedirects", "redirected in a circle", True),
    ("dns error", _UNKNOWN, False),
    ("ConnectionRefused", "connection refused", False),
    ("ConnectionReset", "connection reset", False),
    ("kind: Timeout", "timed out", False),
)


def _diagnose(error: Exception, scheme: str) -> tuple[str, bool]:
    """What an error means, in words of our own, and whether another attempt is useless."""
    if isinstance(error, ShortBody):
        return str(error), False
    text = str(error)
    hint = f"; credentials come from {CREDENTIALS[scheme]}" if scheme in CREDENTIALS else ""
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
        "connect_timeout": _duration(timeouts.connect),
        "read_timeout": _duration(timeouts.stall),
        "timeout": _duration(timeouts.deadline),
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


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"
