"""A real browser without a window, driven through a pipe by the protocol of Chromium's own tools: no driver to install.

As a program it takes pictures: `python tests/browser.py PAGE PICTURE [WIDTH [light|dark [SCRIPT]]]`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds


def program() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """A page in the browser; `complaints` are its errors, warnings and what it asked a network for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.session: str | None = None
        self.number, self.waiting, self.complaints = 0, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: object) -> dict:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        call = {"id": self.number, "method": method, "params": parameters} | session
        os.write(self.to_browser, json.dumps(call).encode() + b"\0")
        while (answer := self.next()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def next(self) -> dict:
        """The next message of the browser."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.from_browser], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            piece = os.read(self.from_browser, 2**20)
            assert piece, "the browser has ended"
            self.waiting += piece
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def note(self, message: dict) -> None:
        method, told = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([value.get("value") for value in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.complaints.append(f"asks for {url}")

    def open(self, file: Path, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Shows a file, and waits until its script is through."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.ask("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + PATIENCE
        while self.run("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < deadline, "the page does not come to an end"
            time.sleep(0.02)

    def run(self, script: str) -> object:
        """What an expression comes to in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    """A browser with one tab, until the block ends."""
    name = program()
    assert name is not None
    pipes = [os.pipe(), os.pipe()]
    # The browser reads from its descriptor 3 and writes to its 4; above them, none can be overwritten on the way there.
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (pipes[0][0], pipes[1][1]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
        flags += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        line = f'exec "$0" "$@" 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-'
        process = subprocess.Popen(
            ["bash", "-c", line, name, *flags],
            pass_fds=(reads, writes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (pipes[0][0], pipes[1][1], reads, writes):
            os.close(end)
        try:
            yield Tab(pipes[0][1], pipes[1][0])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for end in (pipes[0][1], pipes[1][0]):
                os.close(end)


def main() -> None:
    page, picture, width, theme, script = (
        [*sys.argv[1:], "1280", "light", "0"][:5] if len(sys.argv) < 6 else sys.argv[1:6]
    )
    with browser() as tab:
        tab.open(Path(page), width=int(width), theme=theme)
        tab.run(script)
        tab.picture(Path(picture), whole=script == "0")
        print("\n".join(tab.complaints))


if __name__ == "__main__":
    main()
