"""Headless Chromium, driven over its DevTools protocol: what a page does when a person opens it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE") or Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js")
_PATIENCE = 120  # seconds for one answer
_OPTIONS = (
    "--headless --no-sandbox --remote-debugging-pipe --no-first-run --disable-gpu --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --hide-scrollbars about:blank"
)


class Browser:
    """A browser process with one tab. The protocol's messages are JSON, each ended by a NUL."""

    def __init__(self, profile: Path) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_PATIENCE)
        # Chromium reads commands from descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{theirs.fileno()} 4>&{theirs.fileno()}', "bash"]
        command += [str(CHROMIUM), f"--user-data-dir={profile}", *_OPTIONS.split()]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
        theirs.close()
        self._received, self._number, self._session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._socket.close()  # which Chromium takes as its order to leave
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; what happens meanwhile is in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._keep(answer)
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def wait(self, method: str) -> None:
        """Wait for an event that has not happened since `events` was cleared."""
        while not any(name == method for name, _ in self.events):
            self._keep(self._receive())

    def _keep(self, message: dict[str, Any]) -> None:
        if "method" in message:
            self.events.append((message["method"], message["params"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            data = self._socket.recv(1 << 20)
            assert data, "the browser has ended"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page; a promise's when it is kept."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, page: Path, *, width: int, dark: bool = False, media: str = "") -> Opened:
        """Open a file in a window `width` pixels wide and look at what happens."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait("Page.loadEventFired")
        images = self.run(
            "Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() =>"
            "[...document.images].map(image => image.naturalWidth))"
        )
        overflow = self.run("[document.documentElement.scrollWidth, innerWidth]")
        return Opened(
            requests=[about["request"]["url"] for name, about in self.events if name == "Network.requestWillBeSent"],
            # An error, a warning, an exception, or what the browser itself objects to.
            complaints=[
                json.dumps(about)
                for name, about in self.events
                if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            ],
            image_widths=images,
            content_width=overflow[0],
            window_width=overflow[1],
        )

    def charts_on_paper(self) -> set[str]:
        """Of the page that is open, what colours its charts would be printed in: light, dark."""
        scheme = self.run("matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="print", features=features)
        shown = self.run("[...document.images].filter(image => image.offsetWidth).map(image => image.className)")
        self.call("Emulation.setEmulatedMedia", media="", features=features)
        return {"light", "dark"} & set(shown)

    def faults(self) -> list[str]:
        """What axe-core objects to on the page that is open, a line each: impact, rule, elements."""
        self.run(AXE.read_text(encoding="utf-8") + "; 0")
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)")
        return [
            f"{one['impact']}: {one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
            for one in found
        ]

    def screenshot(self) -> bytes:
        """The PNG of the whole page that is open."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def pdf(self) -> bytes:
        """The page that is open, printed on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False, **size)["data"])


@dataclass(frozen=True)
class Opened:
    """What happened as a page was opened.

    requests: URLs asked for. complaints: errors and warnings of the console, as JSON. image_widths: pixels of each
    image, 0 where it did not load. content_width, window_width: CSS pixels; a wider content scrolls sideways.
    """

    requests: list[str]
    complaints: list[str]
    image_widths: list[int]
    content_width: int
    window_width: int


def page_count(pdf: bytes) -> int:
    """The pages of a PDF that Chromium wrote."""
    return len(re.findall(rb"/Type /Page\b", pdf))
