"""`clawrl quantize`: a model with its weights in 4 bits, to train adapters over (QLoRA).

Knows where it is written. How is `training.quantized`'s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clawrl.commands.client import new_folder

GROUPS = (32, 64, 128)
"""Which every engine has products for. 128, as most published models have, takes the least memory and rounds most."""


def add(commands: Any) -> None:
    """Register the command."""
    about = "write a model with its weights in 4 bits, rounded to the nearest, to train adapters over (QLoRA)"
    parser = commands.add_parser("quantize", help=about, description=about)
    parser.add_argument("model", help="a folder, a name in the Hugging Face cache, or clawrl:tiny")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="made if need be, never overwritten; for policy.model")
    parser.add_argument(
        "--group", type=int, choices=GROUPS, default=GROUPS[0], help="inputs that share a scale (default: %(default)s)"
    )
    parser.set_defaults(run=_quantize)


def _quantize(options: argparse.Namespace) -> int:
    folder = new_folder(options.out)
    from clawrl.training.quantized import quantize  # compressed-tensors loads only when needed

    print(f"reading {options.model}", file=sys.stderr, flush=True)
    before, after = quantize(options.model, folder, options.group)
    print(
        f"{folder}: {before / 2**20:.1f} MiB of weights became {after / 2**20:.1f}; train adapters over it with "
        f"[lora] policy.model={folder} policy.dtype=bfloat16 versions.canary_tolerance=0.25",
        file=sys.stderr,
    )
    return 0
