"""A headless Chromium for tests, spoken to over its own DevTools protocol: https://chromedevtools.github.io/devtools-protocol/.

One browser for all tests, a fresh tab for each; what a page logs as an error is kept, so that a test can say there was none.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import re
import shutil
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_PATIENCE = 60.0
_FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu", "--disable-extensions",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
    "--force-color-profile=srgb",
)  # fmt: skip


def find() -> str | None:
    """Return the browser's path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running browser; its connection lives in a thread of its own, so that tests are plain functions."""

    def __init__(self, program: str, place: Path) -> None:
        words = [program, *_FLAGS, f"--user-data-dir={place}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        said = (re.match(r"DevTools listening on (ws://\S+)", line) for line in self._process.stderr)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._do(self._open(next(filter(None, said))[1]))
        # What it says from now on is read and dropped: a full pipe would hold it up.
        self._drain = threading.Thread(target=lambda: [None for _ in self._process.stderr or ()], daemon=True)
        self._drain.start()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

    async def _open(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        self._news = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._waiting.pop(said["id"]).set_result(said)
            else:
                self.events.append(said)
                self._news.set()

    async def _call(self, method: str, session: str | None, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        self._waiting[number] = self._loop.create_future()
        await self._socket.send_json(
            {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        )
        said = await self._waiting[number]
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Give a command; return its result."""
        return dict(self._do(self._call(method, session, params)))

    def heard(self, method: str, **wanted: Any) -> dict[str, Any]:
        """Wait until the browser says something of this kind; return what it says."""

        async def hear() -> dict[str, Any]:
            while True:
                for event in self.events:
                    if event["method"] == method and wanted.items() <= event["params"].items():
                        return dict(event["params"])
                self._news.clear()
                await self._news.wait()

        return dict(self._do(hear()))

    @contextlib.contextmanager
    def tab(self) -> Iterator[Tab]:
        """Open a tab for the length of a block."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        try:
            yield tab
        finally:
            self.call("Target.closeTarget", targetId=target)

    def close(self) -> None:
        """End it."""

        async def close() -> None:
            self._listening.cancel()
            await self._session.close()

        self._do(close())
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert self._process.stderr
        self._process.stderr.close()


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Give this page a command."""
        return self._browser.call(method, self._session, **params)

    def look(self, width: int, height: int, *, scheme: str = "light", phone: bool = False) -> None:
        """Be a screen of this size that prefers a light or a dark scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page, a promise to its end, and return its value."""
        said = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, condition: str, seconds: float = 10.0) -> float:
        """Wait until a condition holds in the page; return after how many seconds it did."""
        script = f"""new Promise((done, fail) => {{
            const began = performance.now();
            const look = () => {{
              const gone = (performance.now() - began) / 1000;
              if ({condition}) return done(gone);
              if (gone > {seconds}) return fail(new Error("waited in vain"));
              setTimeout(look, 10);
            }};
            look(); }})"""
        try:
            return float(self.run(script))
        except AssertionError as error:
            shown = self.run("document.body ? document.body.innerText : ''")
            raise AssertionError(f"{condition} didn't come to hold in {seconds} s; the page shows:\n{shown}") from error

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9, "Enter": 13}[key])

    def picture(self, path: Path, width: int) -> None:
        """Save the whole page as a PNG."""
        height = int(self.run("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]))

    @property
    def errors(self) -> list[str]:
        """What the page logged as an error: exceptions, what its policy forbade, what it could not load."""
        mine = [one for one in self._browser.events if one.get("sessionId") == self._session]
        return [
            str(one["params"])
            for one in mine
            if one["method"] == "Runtime.exceptionThrown"
            or (one["method"] == "Log.entryAdded" and one["params"]["entry"]["level"] == "error")
            or (one["method"] == "Runtime.consoleAPICalled" and one["params"]["type"] in ("error", "assert"))
        ]
