"""`ray job submit --working-dir . -- python -m jobs.serve --config configs/cpu.toml`: the system on a Ray cluster.

Joins the cluster named by RAY_ADDRESS (which `ray job submit` sets); starts a local one if there is none.
"""

from __future__ import annotations

import sys

from clawrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
