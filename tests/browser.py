"""Headless Chromium, driven by its DevTools protocol over a pipe: what a person does to a page, and what it did."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MISSING = "missing: Chromium (Debian: apt-get install chromium)"
WAIT_S = 20.0
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
CONTROL = 2


def chromium() -> str | None:
    """Return where Chromium is, None if it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page in a tab with its own storage; made by `Browser.open`.

    Attributes
    ----------
    requests : addresses that it asked for
    errors : uncaught exceptions, what it wrote to the console as an error or a warning, and resources that failed
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Runtime", "Log", "Network", "Page", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Return a DevTools method's result; see `Browser.call`."""
        return self._browser.call(method, self._session, self._note, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return a JavaScript expression's value."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {done['exceptionDetails']['exception'].get('description')}")
        return done["result"].get("value")

    def wait(self, expression: str, timeout_s: float = WAIT_S) -> None:
        """Wait until an expression is true; TimeoutError with what the page shows."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body?.innerText")
                raise TimeoutError(f"{expression} did not come true in {timeout_s:g} s.\n{shown}\n{self.errors}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """Return an element's text."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def type(self, selector: str, text: str) -> None:
        """Put text into a field as a paste does, in place of what it has."""
        element = f"document.querySelector({json.dumps(selector)})"
        focused = self.evaluate(f"{element}.focus(), {element}.select(), document.activeElement === {element}")
        assert focused, f"{selector} cannot be typed into"
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **names)

    def click(self, selector: str) -> None:
        """Click at an element's centre."""
        x, y = self._centre(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a file field."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    def drop(self, selector: str, file: Path) -> None:
        """Drop a file on an element."""
        x, y = self._centre(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def resize(self, width: int, height: int) -> None:
        """Give the page so many pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark`` colours."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """Write what the page shows as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _centre(self, selector: str) -> tuple[float, float]:
        box = self.evaluate(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return box[0], box[1]

    def _note(self, event: Any) -> None:
        values = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            case "Runtime.exceptionThrown":
                details = values["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(one.get("value")) for one in values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.errors.append(values["entry"]["text"])


class Browser:
    """A running browser; made by `open_browser`."""

    def __init__(self, sending: int, receiving: int) -> None:
        self._sending, self._receiving = sending, receiving
        self._numbers = itertools.count(1)
        self._buffer = b""

    @contextlib.contextmanager
    def open(self, address: str, width: int = 1200, height: int = 800) -> Iterator[Page]:
        """Open an address in a new tab of so many pixels, without cookies and storage; close it with the block."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.resize(width, height)
        page.call("Page.navigate", url=address)
        page.wait("document.readyState === 'complete' && location.protocol !== 'about:'")
        yield page
        self.call("Target.disposeBrowserContext", browserContextId=context)

    def call(
        self, method: str, session: str | None = None, note: Callable[[Any], None] | None = None, **parameters: Any
    ) -> Any:
        """Return a DevTools method's result.

        Parameters
        ----------
        session : of a page
        note : called with the page's events that arrive meanwhile

        Raises
        ------
        RuntimeError
            If it fails.
        TimeoutError
            If it takes too long.
        """
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        sent = json.dumps(message).encode() + b"\0"
        while sent:
            sent = sent[os.write(self._sending, sent) :]
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == number:
                break
            if note is not None and "method" in answer and answer.get("sessionId") == session:
                note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, deadline: float, what: str) -> Any:
        while b"\0" not in self._buffer:
            if not select.select([self._receiving], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer {what} in {WAIT_S:g} s.")
            read = os.read(self._receiving, 2**20)
            if not read:
                raise RuntimeError(f"Chromium ended during {what}.")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser; it ends with the block.

    Parameters
    ----------
    profile : an empty folder for what the browser writes
    """
    executable = chromium()
    if executable is None:
        raise RuntimeError(MISSING)
    pipes = [os.pipe(), os.pipe()]
    # The browser reads from 3 and writes to 4; numbers from 10 on are not in the way of these.
    theirs = [fcntl.fcntl(pipes[0][0], fcntl.F_DUPFD, 10), fcntl.fcntl(pipes[1][1], fcntl.F_DUPFD, 10)]
    options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--lang=en"]
    options += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # it refuses to start as root otherwise
    process = subprocess.Popen(
        ["bash", "-c", 'exec "${@:3}" 3<&"$1" 4>&"$2"', "bash", *map(str, theirs), executable, *options],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for descriptor in (pipes[0][0], pipes[1][1], *theirs):
        os.close(descriptor)
    try:
        yield Browser(pipes[0][1], pipes[1][0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(pipes[0][1])
        os.close(pipes[1][0])
