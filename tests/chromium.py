"""Chromium without a window, spoken to over the two pipes of its DevTools protocol: no port, no package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
SETTLE_S = 60


def found() -> str | None:
    """Path of the browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page; `messages` is what its console and the browser's log said, `requests` every address it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer = commands, answers, b""
        self._number, self._session = 0, ""
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command. RuntimeError if the browser refuses it, TimeoutError if it does not answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + SETTLE_S
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser says nothing for {SETTLE_S} s")
            if not (data := os.read(self._answers, 1 << 20)):
                raise RuntimeError("the browser has gone")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        what, method = event.get("params", {}), event.get("method")
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(what))
        elif method == "Log.entryAdded":
            self.messages.append(f"{what['entry']['level']}: {what['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Loads the file in a window of that many CSS pixels, a telephone's below 600."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=path.absolute().as_uri())
        while (
            self("Runtime.evaluate", expression="document.readyState")["result"]["value"] != "complete"
            or self.js("location.protocol") != "file:"
        ):
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False, **size: int) -> Path:
        """Writes a PNG of the window, of the whole page, or of its upper left corner of `width` by `height` pixels."""
        whole_page = {"width": self.js("innerWidth"), "height": self.js("document.documentElement.scrollHeight")}
        clip = {"clip": {"x": 0, "y": 0, "scale": 1, **(size or whole_page)}, "captureBeyondViewport": True} if whole or size else {}
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", **clip)["data"]))
        return path


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that ends with the block; `profile` is a folder for its files. RuntimeError if there is no browser."""
    program = found()
    if program is None:
        raise RuntimeError(f"none of {', '.join(NAMES)} is installed")
    (its_commands, commands), (answers, its_answers) = (map(_high, os.pipe()) for _ in range(2))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking"]
    command = [sys.executable, "-c", LAUNCH, str(its_commands), str(its_answers), program, *flags]
    with open(profile / "log", "wb") as log:
        process = subprocess.Popen(command, pass_fds=(its_commands, its_answers), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    os.close(its_commands)
    os.close(its_answers)
    try:
        yield Tab(commands, answers)
    finally:
        os.close(commands)  # which ends it
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _high(descriptor: int) -> int:
    """The same file under a number that neither 3 nor 4 is."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
