"""A server of byte ranges on the loopback interface: HTTP, S3 and Google Cloud Storage at once, failing as told."""

import re
import socket
import struct
import threading
import zlib
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Request:
    """One request: the byte range asked for, and how many bytes of body were sent so far."""

    method: str
    name: str
    headers: dict[str, str]
    begin: int = 0
    end: int = 0
    sent: int = 0


class Loopback:
    """Serves the files of `folder` at `http`, `s3` and `gs`, three roots of URLs that name the same objects.

    `faults` are met by the next requests, one each (`head_faults` by HEAD requests), a status code or: "reset" and
    "stall" in mid-body, "short" (fewer bytes than announced), "cut" (fewer bytes, announced as such), "whole" (all
    bytes, status 200), "shifted" (another range than asked), "grown" (another total size), "new etag", "stall
    first" (before the headers), "circle" (a redirection to the same place). `usual` is met by all others, once `good`
    requests have been served; `named` by those for an object of that name. `etag`: "strong", "weak" or "none".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: deque[int | str] = deque()
        self.head_faults: deque[int | str] = deque()
        self.usual: int | str | None = None
        self.good = 0
        self.named: dict[str, int | str] = {}
        self.etag = "strong"
        self.latency = 0.0
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._contents: dict[tuple[Path, int, int], tuple[bytes, str]] = {}
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.loopback = self
        port = self._server.server_address[1]
        self.bucket = f"bucket-{port}"
        self.endpoint = f"http://127.0.0.1:{port}"
        self.http, self.s3, self.gs = self.endpoint, f"s3://{self.bucket}", f"gs://{self.bucket}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead s3:// and gs:// here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
            "GOOGLE_BASE_URL": self.endpoint,
            "GOOGLE_ALLOW_HTTP": "true",
            "GOOGLE_SKIP_SIGNATURE": "true",
        }

    @property
    def sent(self) -> int:
        """Bytes of bodies so far."""
        return sum(request.sent for request in self.requests)

    def ranges(self) -> list[tuple[int, int]]:
        """The byte ranges asked for so far."""
        return [(request.begin, request.end) for request in self.requests if request.method == "GET"]

    def content(self, path: Path) -> tuple[bytes, str]:
        """The bytes of a file and what its etag says, of the file as it is now."""
        found = path.stat()
        version = path, found.st_mtime_ns, found.st_size
        if version not in self._contents:
            data = path.read_bytes()
            self._contents[version] = data, f"{zlib.crc32(data):08x}"
        return self._contents[version]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    loopback: Loopback

    def handle_error(self, request, client_address) -> None:
        """Clients hang up on a server that fails: not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(self.server.loopback.head_faults)

    def do_GET(self) -> None:
        self._answer(self.server.loopback.faults)

    def _answer(self, faults: deque[int | str]) -> None:
        host = self.server.loopback
        if host.latency:
            host.closing.wait(host.latency)
        url = urlsplit(self.path)
        name = unquote(url.path).lstrip("/").removeprefix(f"{host.bucket}").lstrip("/")
        with host.lock:
            usual = host.usual if len(host.requests) >= host.good else None
            fault = faults.popleft() if faults else host.named.get(name, usual)
        self._request = Request(self.command, name, dict(self.headers))
        with host.lock:
            host.requests.append(self._request)
        if isinstance(fault, int):
            self._send(fault, {}, b"what the server says stays unsaid: wJalrXUtnFEMI")
        elif fault == "circle":
            self._send(302, {"Location": self.path}, b"")
        elif not name:
            self._send(200, {}, self._list(parse_qs(url.query)))
        elif not (host.folder / name).is_file():
            self._send(404, {}, b"")
        else:
            self._object(host.folder / name, fault)

    def _object(self, path: Path, fault: int | str | None) -> None:
        host = self.server.loopback
        data, tag = host.content(path)
        etag = {"strong": f'"{tag}"', "weak": f'W/"{tag}"', "none": None}[host.etag]
        wanted = self.headers.get("If-Match")
        size = len(data) + (512 if fault == "grown" else 0)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(int(asked[2] or size) + 1, len(data))) if asked else (0, len(data))
        self._request.begin, self._request.end = begin, end
        headers = {"ETag": '"another"' if fault == "new etag" else etag} if etag else {}
        if fault == "stall first":
            host.closing.wait(30)
        if wanted is not None and etag is not None and wanted != etag:
            self._send(412, headers, b"")
        elif asked and begin >= len(data):
            self._send(416, headers, b"")
        elif asked and fault != "whole":
            shift = 512 if fault == "shifted" else 0
            headers["Content-Range"] = f"bytes {begin + shift}-{end - 1 + shift}/{size}"
            self._send(206, headers, data[begin:end], fault)
        else:
            self._send(200, headers, data + bytes(size - len(data)), fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: int | str | None = None) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        if fault == "cut":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("reset", "stall", "short"):
            body = body[: len(body) // 2]
            self.close_connection = True
        self._request.sent = len(body)
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            self.server.loopback.closing.wait(30)
        elif fault == "reset":
            # What was sent arrives before the reset does, so that tests can say where the transfer broke.
            self.server.loopback.closing.wait(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _list(self, query: dict[str, list[str]]) -> bytes:
        """Version 2 of S3's list, two objects a page; Google's XML API answers alike."""
        host = self.server.loopback
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", [""])[0]
        names = sorted(path.relative_to(host.folder).as_posix() for path in host.folder.rglob("*") if path.is_file())
        names = [name for name in names if name.startswith(prefix) and name > after]
        direct = [name for name in names if "/" not in name[len(prefix) :]]
        folders = {prefix + name[len(prefix) :].partition("/")[0] + "/" for name in names if name not in direct}
        page, more = direct[:2], direct[2:]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>&quot;0&quot;</ETag><Size>{(host.folder / name).stat().st_size}</Size></Contents>"
            for name in page
        )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0"?><ListBucketResult><Name>{host.bucket}</Name><Prefix>{escape(prefix)}</Prefix>'
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{contents}{common}</ListBucketResult>"
        ).encode()
