"""`python -m jobs.eval pools|personal [--config FILE] [--arms A,B] [--seeds N] [section.key=v …]`

Each verb is a module with a `parser` and what it does, `run`.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from clawrl.errors import ClawrlError, ConfigError
from jobs.eval import personal, pools

VERBS = {"pools": pools, "personal": personal}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 all runs to be made came to an end, 1 some did not, 2 wrong use or config, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    verbs = argparse.ArgumentParser(prog="python -m jobs.eval", description="What learning brings, over several runs.")
    verbs.add_argument("verb", choices=list(VERBS), help="what is evaluated; `VERB --help` tells its options")
    verb = VERBS[verbs.parse_args(given[:1]).verb]
    options = verb.parser().parse_intermixed_args(given[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return verb.run(options, f"python -m jobs.eval {shlex.join(given)}")
    except KeyboardInterrupt:
        print("eval: interrupted; the same command goes on with the runs that are left", file=sys.stderr)
        return 130
    except ClawrlError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
