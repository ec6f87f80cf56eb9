"""A wall clock of a system's own, which can be set while it runs; the machine's clock stays as it is.

Every process of the system loads a few lines of C (`clock.c`, compiled when needed), which add to the wall clock what a
file says: all of them see the same jump at the same moment. Monotonic clocks and the times of files stay real.
libfaketime does not serve here: under its 0.9.10 Python's `time.sleep` fails.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

SEEN_S = 60.0
_SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """What is added to the wall clock of those who are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise FileNotFoundError("no C compiler here, so no clock can jump; install Debian's `gcc` and `libc6-dev`")
        folder.mkdir(parents=True, exist_ok=True)
        self._file, library = folder / "clock", folder / "clock.so"
        command = [compiler, "-O2", "-fPIC", "-shared", str(_SOURCE), "-o", str(library), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(library),
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "CLAWRL_CHAOS_CLOCK": str(self._file),
        }
        self._file.write_bytes(struct.pack("l", 0))

    def set(self, seconds: int) -> None:
        """Put the clock so far ahead of the machine's."""
        with self._file.open("r+b") as file:  # in place: the processes have mapped it
            file.write(struct.pack("l", seconds))


def wait_until_seen(ahead: Callable[[], float | None], seconds: float) -> None:
    """Return when `ahead`, which tells how far ahead of the machine's clock the system's newest record is, agrees.

    Raises RuntimeError if it never does: then no clock has jumped.
    """
    deadline = time.monotonic() + SEEN_S
    while (found := ahead()) is None or abs(found - seconds) > SEEN_S:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the system's clock is {found} s ahead instead of {seconds:g} s")
        time.sleep(0.5)
