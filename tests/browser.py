"""A real Chromium without a window, told what to do over two pipes in its own protocol; no driver between.

with Chromium(folder) as browser:
    page = browser.open("http://127.0.0.1:8000/compare", width=1280, height=900)
    page.wait("document.body.dataset.ready")
    page.evaluate("document.title")
"""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_S = 60


def chromium() -> str:
    """The program's path; empty where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), "")


class Chromium:
    """One browser with a profile of its own, ended with the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._said = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        commands, to_browser = os.pipe()
        from_browser, answers = os.pipe()

        def at_three_and_four() -> None:
            os.dup2(os.dup(commands), 3)
            os.dup2(os.dup(answers), 4)

        # the numbers are the protocol's
        self._process = subprocess.Popen(
            [chromium(), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=at_three_and_four,
            pass_fds=(3, 4),
        )
        os.close(commands)
        os.close(answers)
        self._to_browser, self._from_browser = to_browser, from_browser
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command -> its result. Events on the way are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, said["error"]
                result: dict[str, Any] = said["result"]
                return result
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._said:
            ready, _, _ = select.select([self._from_browser], [], [], ANSWER_S)
            assert ready, "the browser does not answer"
            piece = os.read(self._from_browser, 1 << 20)
            assert piece, "the browser has ended"
            self._said += piece
        message, _, self._said = self._said.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> "Page":
        """A new page of that size, at `url`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        phone = width < 600
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        while not any(self._is_load(event, session) for event in self.events):
            self.events.append(self._next())
        return page

    def _is_load(self, event: dict[str, Any], session: str) -> bool:
        return event.get("method") == "Page.loadEventFired" and event.get("sessionId") == session


class Page:
    """One page of the browser."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Until an expression is true -> its value."""
        look = (
            f"const look = () => {{ const v = ({condition}); v ? found(v) : setTimeout(look, 20); }}; look();"
        )
        return self.evaluate(f"new Promise((found) => {{ {look} }})")

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page: errors, and what its policy forbade."""
        said = []
        for event in self._browser.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                said.append(str(params["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                said.append(str(params["entry"]["text"]))
        return said

    def requested(self) -> list[str]:
        """Every address that the page has asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
