"""Entry points that put the parts together for one purpose each: `python -m jobs.<name>`, or `ray job submit`."""

import socket
import time

STARTED = time.time()
"""When this process began its job, before the heavy imports; seconds since the epoch."""


def free_port() -> int:
    """A port of this machine's loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
