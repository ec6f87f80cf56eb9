"""A wall clock of a system's own, which can be set while it runs; the machine's clock stays as it is.

Knows libfaketime (Debian's `faketime`), which every process of the system loads: it adds to the wall clock what a file
says, within a second of a change. Monotonic clocks and the times of files stay real, as they do when a machine's clock
is set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from glob import glob
from pathlib import Path

SEEN_S = 60.0


class Clock:
    """What is added to the wall clock of those who are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where libfaketime is not installed."""
        found = sorted(glob("/usr/lib/*/faketime/libfaketimeMT.so.1"))
        if not found:
            raise FileNotFoundError("no libfaketime here, so no clock can jump; install Debian's `faketime`")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "clock"
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": found[-1],
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.set(0.0)

    def set(self, seconds: float) -> None:
        """Put the clock so far ahead of the machine's."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+.0f}\n")
        os.replace(fresh, self._file)  # nobody reads half a number


def wait_until_seen(ahead: Callable[[], float | None], seconds: float) -> None:
    """Return when `ahead`, which tells how far ahead of the machine's clock the system's newest record is, agrees.

    Raises RuntimeError if it never does: then no clock has jumped.
    """
    deadline = time.monotonic() + SEEN_S
    while (found := ahead()) is None or abs(found - seconds) > SEEN_S:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the system's clock is {found} s ahead instead of {seconds:g} s")
        time.sleep(0.5)
