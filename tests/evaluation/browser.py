"""A headless Chromium driven through its debugging pipe (the Chrome DevTools Protocol), for the tests of the
page.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--no-first-run",
]


class Browser:
    """One page of a browser: commands and their results, and what it had to say meanwhile."""

    def __init__(self, to: int, back: int):
        self.to, self.back, self.buffer, self.count = to, back, b"", 0
        self.session: str | None = None
        self.events: list[dict] = []

    def call(self, method: str, **parameters: Any) -> dict:
        """Send a command and wait for its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self) -> dict:
        """The next message; events are kept."""
        deadline = time.monotonic() + 60
        while b"\0" not in self.buffer:
            assert select.select([self.back], [], [], deadline - time.monotonic())[0], (
                "the browser says nothing"
            )
            read = os.read(self.back, 2**20)
            assert read, "the browser has ended"
            self.buffer += read
        message, self.buffer = self.buffer.split(b"\0", 1)
        found = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Show a file in a window of some width, and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def said(self, *methods: str) -> list[dict]:
        """Events of some kinds since the page was opened."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def screenshot(self, path: Path) -> None:
        """Write the whole page, not only what the window shows, as a PNG."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty page, until the end of the block."""
    (child_in, to), (back, child_out) = os.pipe(), os.pipe()

    def wire() -> None:
        os.dup2(child_in, 13), os.dup2(child_out, 14)
        os.dup2(13, 3), os.dup2(14, 4)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=wire, close_fds=False, **silent)
    os.close(child_in), os.close(child_out)
    try:
        page = Browser(to, back)
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(to), os.close(back)
