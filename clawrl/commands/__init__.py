"""Families of `clawrl` subcommands; each module registers its parsers with `add` and talks HTTP to a running system."""
