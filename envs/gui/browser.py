"""The one browser of a process, in a thread of its own; it ends with its last user, and a dead one is replaced.

    environments, any thread ─ run(coroutine) ─► the event loop's thread ─► playwright ─► chromium, without a network

Knows the executable, playwright's start and the wall around the browser. Ignores pages and tasks.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Coroutine
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from playwright.async_api import Browser as Chromium
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Playwright, async_playwright

from clawrl.errors import EnvError

T = TypeVar("T")

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
)
LAUNCH_S = 60.0
STOP_S = 5.0
"""So long the browser, and then playwright, may take to end."""
CALL_S = 60.0
"""Longer than any action's own limits: a browser that has not answered by then is hung."""


class Browser:
    """A running chromium. It sees no network: pages come from whoever answers its requests (`tab`)."""

    def __init__(self, executable: str) -> None:
        """Raises EnvError if it does not start."""
        self.executable, self.users = executable, 0
        self._hung = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="browser", daemon=True)
        self._thread.start()
        self._playwright: Playwright | None = None
        self._chromium: Chromium | None = None
        try:
            self.run(self._start(), LAUNCH_S)
        except BaseException:
            self.close()
            raise

    @property
    def chromium(self) -> Chromium:
        assert self._chromium is not None, "it has started"
        return self._chromium

    @property
    def alive(self) -> bool:
        return not self._hung and self.chromium.is_connected()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = CALL_S) -> T:
        """What a coroutine on the browser's objects returns. Raises EnvError if the browser died, hangs or refuses."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            future.cancel()
            self._hung = True
            raise EnvError(f"gui: no answer from the browser in {seconds:g} s; the next reset starts one") from error
        except PlaywrightError as error:
            if self._chromium is not None and not self.alive:
                raise EnvError("gui: the browser died; the next reset starts another") from error
            raise EnvError(f"gui: {self.executable}: {first_line(error)}") from error

    def close(self) -> None:
        """End the browser and its thread."""
        with suppress(EnvError):
            self.run(self._stop(), STOP_S * 3)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._playwright = await async_playwright().start()
        with tempfile.TemporaryDirectory(prefix="clawrl-browser-") as folder:
            self._chromium = await self._playwright.chromium.launch(
                executable_path=walled(self.executable, Path(folder)), args=list(FLAGS), chromium_sandbox=False
            )

    async def _stop(self) -> None:
        """A browser that does not close ends with playwright's driver, whose child it is."""
        if self._chromium is not None:
            with suppress(PlaywrightError, TimeoutError):
                await asyncio.wait_for(self._chromium.close(), STOP_S)
        if self._playwright is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._playwright.stop(), STOP_S)


_lock = threading.Lock()
_running: dict[str, Browser] = {}


def hold(executable: str) -> Browser:
    """The process's browser; release it. Raises EnvError if it does not start."""
    with _lock:
        browser = _running.get(executable)
        if browser is None or not browser.alive:
            browser = _running[executable] = Browser(executable)
        browser.users += 1
        return browser


def release(browser: Browser) -> None:
    """Give up what `hold` gave; the last user's release ends the browser."""
    with _lock:
        browser.users -= 1
        if browser.users == 0:
            if _running.get(browser.executable) is browser:
                del _running[browser.executable]
            browser.close()


def find_browser(named: str | None = None) -> str:
    """The path of a chromium. Raises EnvError, with the remedy, if there is none."""
    for name in (named,) if named else NAMES:
        if found := shutil.which(name):
            return found
    if named:
        raise EnvError(f"gui: browser={named!r} is no executable; name a chromium, or leave the option out")
    raise EnvError(f"gui: there is no {NAMES[0]} in PATH; install Debian's {NAMES[0]}, or name one (option browser)")


def walled(executable: str, folder: Path) -> Path:
    """A script that starts the executable in a network namespace of its own, with nothing in it."""
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*no_network(), executable])} "$@"\n')
    script.chmod(0o700)
    return script


@cache
def no_network() -> tuple[str, ...]:
    """The words before a command that take the network away from it; none where this system allows no namespaces."""
    who = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    words = ("unshare", *who, "--net", "--")
    try:
        works = subprocess.run([*words, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return words if works else ()


def first_line(error: Exception) -> str:
    """The first line of what playwright says, which is what went wrong; the rest is its log."""
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__
