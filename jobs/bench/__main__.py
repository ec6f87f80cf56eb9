"""`python -m jobs.bench NAME [--json FILE] [--config FILE] [section.key=value …]`; `--help` lists the names.

Prints a table, and writes the same with its circumstances as JSON. Ratios are measured side by side in one run and
travel between machines; times and rates do not, least of all from a busy one: `load` says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from clawrl.config import Config, load_config
from clawrl.errors import ClawrlError
from jobs.bench import figures


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: measured (goals met or not); 1: failed."""
    options = _parser().parse_args(arguments)
    started, before = time.time(), os.getloadavg()[0]
    try:
        config = load_config(options.config, options.overrides)
        found, details = _run(options, config)
    except ClawrlError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    circumstances = {
        "bench": options.verb,
        "command": f"python -m jobs.bench {' '.join(arguments if arguments is not None else sys.argv[1:])}",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "cores": os.cpu_count(),
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],  # 1-minute averages before and after
    }
    print(figures.table(found))
    print(" ".join(f"{key}={value}" for key, value in circumstances.items()))
    if options.json:
        report = {**circumstances, "figures": figures.as_json(found), "details": details}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure speed and memory of clawrl.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serving = verbs.add_parser("serving", help="throughput through the gateway against the engine called directly")
    serving.add_argument("--rounds", type=int, default=10, help="pairs to take the median of (default: %(default)s)")
    serving.add_argument("--tokens", type=int, default=256, help="tokens of each reply (default: %(default)s)")
    serving.add_argument("--in-turn", type=int, default=4, help="replies to each stream (default: %(default)s)")
    clients = verbs.add_parser("clients", help="what the gateway costs, against vLLM's own server and LiteLLM's proxy")
    clients.add_argument("--rounds", type=int, default=6, help="of each (default: %(default)s)")
    clients.add_argument("--tokens", type=int, default=128, help="tokens of each reply (default: %(default)s)")
    clients.add_argument("--in-turn", type=int, default=4, help="replies to each stream (default: %(default)s)")
    clients.add_argument("--no-litellm", action="store_true", help="leave LiteLLM out: nothing is installed")
    swap = verbs.add_parser("swap", help="stalls of running streams while versions are swapped in")
    swap.add_argument("--swaps", type=int, default=20)
    swap.add_argument("--streams", type=int, default=8)
    swap.add_argument("--tokens", type=int, default=512, help="tokens of each reply (default: %(default)s)")
    feedback = verbs.add_parser(
        "feedback", help="from a correction to the first reply by a version that learnt from it"
    )
    feedback.add_argument("--corrections", type=int, default=10, help="one after the other (default: %(default)s)")
    users = verbs.add_parser("users", help="users with policies of their own in one engine, against one user")
    users.add_argument("--users", type=int, default=200, help="how many (default: %(default)s)")
    users.add_argument("--rounds", type=int, default=12, help="of 16 streams at a time (default: %(default)s)")
    users.add_argument("--tokens", type=int, default=64, help="tokens of each reply (default: %(default)s)")
    train = verbs.add_parser("train", help="trainer against a plain PyTorch loop with as many threads")
    train.add_argument("--steps", type=int, default=12)
    memory = verbs.add_parser("memory", help="memory of the whole system while it serves, judges and trains")
    memory.add_argument("--seconds", type=float, default=60.0, help="how long to watch it (default: %(default)s)")
    journal = verbs.add_parser("journal", help="time per turn in a small journal and in a large one")
    journal.add_argument("--url", help="a PostgreSQL database (default: SQLite files)")
    journal.add_argument("--small", type=int, default=1000, help="turns of the small one (default: %(default)s)")
    journal.add_argument("--large", type=int, default=1_000_000, help="turns of the large one (default: %(default)s)")
    journal.add_argument("--turns", type=int, default=1000, help="turns measured at each size (default: %(default)s)")
    sandbox = verbs.add_parser("sandbox", help="start and command latency of sandboxes, backends side by side")
    sandbox.add_argument("--rounds", type=int, default=10, help="sandboxes of each (default: %(default)s)")
    sandbox.add_argument("--commands", type=int, default=500, help="in each one's shell (default: %(default)s)")
    sandbox.add_argument("--together", type=int, default=16, help="up at the same time (default: %(default)s)")
    envs = verbs.add_parser("envs", help="the pool of environments: overhead, throughput, leaks")
    envs.add_argument("--rounds", type=int, default=5, help="pairs to take the median of (default: %(default)s)")
    envs.add_argument("--seconds", type=float, default=8.0, help="each rate is watched so long (default: %(default)s)")
    envs.add_argument("--crowd", type=int, default=1024, help="simulated environments (default: %(default)s)")
    envs.add_argument("--episodes", type=int, default=10_000, help="to look for leaks after (default: %(default)s)")
    for verb in (serving, clients, feedback, users, swap, train, memory, journal, sandbox, envs):
        verb.add_argument("--json", metavar="FILE", help="write the figures there too")
        verb.add_argument("--config", metavar="FILE", help="TOML file (default: the embedded CPU configuration)")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return parser


def _run(options: argparse.Namespace, config: Config) -> tuple[list[figures.Figure], dict[str, Any]]:
    if options.verb == "serving":
        from jobs.bench.serving import measure as serving

        return serving(config, rounds=options.rounds, num_tokens=options.tokens, in_turn=options.in_turn)
    if options.verb == "clients":
        from jobs.bench.clients import measure as clients

        words = [*(["--config", options.config] if options.config else []), *options.overrides]
        asked = {"rounds": options.rounds, "num_tokens": options.tokens, "in_turn": options.in_turn}
        return clients(config, words, litellm=not options.no_litellm, **asked)
    if options.verb == "swap":
        from jobs.bench.swap import measure as swap

        return swap(config, swaps=options.swaps, streams=options.streams, num_tokens=options.tokens)
    if options.verb == "feedback":
        from jobs.bench.feedback import measure as feedback

        return feedback(config, corrections=options.corrections)
    if options.verb == "users":
        from jobs.bench.users import measure as users

        return users(config, users=options.users, rounds=options.rounds, num_tokens=options.tokens)
    if options.verb == "train":
        from jobs.bench.train import measure as train

        return train(config, steps=options.steps)
    if options.verb == "journal":
        from jobs.bench.journal import measure as journal

        return journal(options.url, small=options.small, large=options.large, turns=options.turns)
    if options.verb == "sandbox":
        from jobs.bench.sandbox import measure as sandbox

        return sandbox(rounds=options.rounds, commands=options.commands, together=options.together)
    if options.verb == "envs":
        from jobs.bench.envs import measure as envs

        return envs(crowd=options.crowd, episodes=options.episodes, rounds=options.rounds, seconds=options.seconds)
    from jobs.bench.memory import measure as memory

    return memory(config, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())
