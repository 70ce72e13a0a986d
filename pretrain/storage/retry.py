"""One request to an object store, tried again until it succeeds or its deadline passes; and its errors in plain words.

The store library's own retries are off: they begin a broken transfer anew. Its error texts are not passed on, since
they can hold details of a request.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from obstore.exceptions import BaseError, NotSupportedError

from pretrain.errors import InputError, StorageError

CREDENTIALS = {  # where each kind of bucket gets them from
    "s3": "the AWS_* variables of the environment or the machine's role (public bucket: AWS_SKIP_SIGNATURE=true)",
    "gs": "the GOOGLE_* variables of the environment or the machine's role (public bucket: GOOGLE_SKIP_SIGNATURE=true)",
}
_WARN_AFTER = 10.0  # seconds without success
# A host that has never been found may be mistyped; one that has been found before has only gone away.
_HOST_NOT_FOUND, _NEW_HOST_DEADLINE = "host not found", 20.0  # seconds

_log = logging.getLogger(__name__)
_found: set[str] = set()  # hosts and buckets that have answered
_jitter = random.Random()  # its own: a run's seed would give all ranks the same pauses

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timeouts:
    """How long an object store is waited for, in seconds.

    connect: for a connection.
    stall: for the next bytes.
    deadline: for one range, over all attempts.
    first_backoff, most_backoff: the pause before attempt k+2 is drawn from 0 … min(first_backoff·2^k, most_backoff);
        k starts again at 0 once bytes arrive.
    """

    connect: float = 10.0
    stall: float = 30.0
    deadline: float = 300.0
    first_backoff: float = 0.2
    most_backoff: float = 20.0


TIMEOUTS = Timeouts()


class ShortBody(ConnectionError):
    """A body that ends before its last byte, without an error of the transport."""


class Retry:
    """The attempts at one request."""

    def __init__(
        self,
        request: str,
        scheme: str,
        root: str,
        timeouts: Timeouts,
        stop: threading.Event | None = None,
        *,
        first: bool = False,
    ) -> None:
        """
        Args:
            request: what is asked for, as errors name it.
            scheme: http, https, s3 or gs.
            root: host with port, or bucket.
            stop: an event that ends the waiting with CancelledError.
            first: nothing was asked of this object before, so its host may be mistyped.
        """
        self._request, self._scheme, self._root = request, scheme, root
        self._timeouts, self._stop, self._first = timeouts, stop or threading.Event(), first
        self._begun = time.monotonic()
        self._attempts = 0
        self._fruitless = 0  # attempts since bytes arrived last
        self._warned = False

    def run(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, called again while that may help.

        Raises InputError where it cannot, StorageError once the deadline has passed.
        """
        while True:
            self._attempts += 1
            try:
                result = attempt()
                _found.add(self._root)
                return result
            except (BaseError, OSError, ValueError) as error:
                reason, permanent = _diagnose(error, self._scheme)
            # Outside the handler, so that the library's error is not chained: its text may tell too much.
            if permanent:
                raise InputError(f"{self._request}: {reason}")
            if reason != _HOST_NOT_FOUND:
                _found.add(self._root)
            self._pause(reason)

    def arrived(self) -> None:
        """Note that bytes arrived. Raises CancelledError, or StorageError past the deadline."""
        self._fruitless = 0
        if self._stop.is_set():
            raise CancelledError
        if self._seconds() > self._timeouts.deadline:
            raise StorageError(self._given_up("too slow: bytes still arrive"))

    def _pause(self, reason: str) -> None:
        timeouts = self._timeouts
        pause = _jitter.uniform(0, min(timeouts.first_backoff * 2 ** min(self._fruitless, 32), timeouts.most_backoff))
        self._fruitless += 1
        new_host = self._first and self._root not in _found
        deadline = min(_NEW_HOST_DEADLINE, timeouts.deadline) if new_host else timeouts.deadline
        if self._seconds() + pause >= deadline:
            raise (InputError if new_host else StorageError)(self._given_up(reason))
        if self._seconds() > _WARN_AFTER and not self._warned:
            self._warned = True
            _log.warning("%s: %s; tried again for %g s in all", self._request, reason, timeouts.deadline)
        if self._stop.wait(pause):
            raise CancelledError

    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _given_up(self, reason: str) -> str:
        tries = "1 attempt" if self._attempts == 1 else f"{self._attempts} attempts"
        return f"{self._request}: cannot be read: {reason}; given up after {tries} in {self._seconds():.1f} s"


# The library has one class for most failures: words of its debug text → what to say, and whether that is permanent.
_CAUSES = (
    ("BadScheme", "its endpoint is plain http; AWS_ALLOW_HTTP=true or GOOGLE_ALLOW_HTTP=true permits that", True),
    ("BareRedirect", "redirected to nowhere (for s3://, AWS_REGION has to name the bucket's region)", True),
    ("InvalidCertificate", "the server's TLS certificate is not trusted", True),
    ("InvalidContentType", "the server does not speak TLS; http:// would be right", True),
    ("TooManyRedirects", "redirected in a circle", True),
    ("UnexpectedRange", "the server answered with other bytes than those asked for", True),
    ("dns error", _HOST_NOT_FOUND, False),
    ("ConnectionRefused", "connection refused", False),
    ("ConnectionReset", "connection reset", False),
    ("kind: Timeout", "timed out", False),
    ("HttpError", "the connection broke", False),
)


def _diagnose(error: Exception, scheme: str) -> tuple[str, bool]:
    """What an error means, in words of our own, and whether another attempt is useless."""
    if isinstance(error, ShortBody):
        return str(error), False
    text = str(error)
    hint = f"; credentials come from {CREDENTIALS[scheme]}" if scheme in CREDENTIALS else ""
    status = re.search(r"non-2xx status code: (\d{3})", text)
    code = int(status[1]) if status else 0
    refused = 0 < code < 500 and code not in (408, 429)
    if "http://169.254." in text.partition("\n")[0]:  # the machine's own service that hands out credentials
        return f"no credentials{hint}", refused
    if code:
        phrase = HTTPStatus(code).phrase if code in HTTPStatus._value2member_map_ else ""
        known = {401: hint, 403: hint, 416: ": it ends before these bytes"}.get(code, "")
        return f"{code} {phrase}".strip() + known, refused
    if isinstance(error, FileNotFoundError):
        return "no such object", True
    if isinstance(error, NotSupportedError):
        reason = "the server does not serve byte ranges (it answers with the whole object)"
        return f"{reason}; use one that does, or a copy here", True
    for word, reason, permanent in _CAUSES:
        if word in text:
            return reason, permanent
    return f"not understood ({type(error).__name__}){hint}", True
