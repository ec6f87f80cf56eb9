"""Families of `clawrl` subcommands; each module registers its parsers with `add`. Most talk HTTP to clawrl."""
