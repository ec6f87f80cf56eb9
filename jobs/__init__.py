"""Entry points that put the parts together for one purpose each: `python -m jobs.<name>`, or `ray job submit`."""

import time

STARTED = time.time()
"""When this process began its job, before the heavy imports; seconds since the epoch."""
