"""Servers beside the measured one, each a process of its own that ends with the measurement."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

from clawrl.errors import ClawrlError

PATIENCE_S = 180.0


@contextmanager
def program(command: Sequence[str], url: str, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Started, and answering at `url`; whatever it says goes to stderr. Raises ClawrlError if it does not come up."""
    process = subprocess.Popen(command, stdout=sys.stderr, env=env)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ClawrlError(f"{' '.join(command[:4])} does not answer at {url}") from None
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
