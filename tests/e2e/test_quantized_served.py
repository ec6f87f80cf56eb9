"""Adapters over a base in 4 bits (QLoRA) that the command has made: served, judged by and trained over."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import Server, start_server, stop_server
from test_adapters_served import CONFIG, reply
from test_system import converse, scored

from clawrl.cli import main
from clawrl.config import model_path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-4bit"
    assert main(["quantize", "clawrl:tiny", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = (f"policy.model={os.path.relpath(base)}", "policy.dtype=bfloat16", "versions.canary_tolerance=0.25")
    more = ("buffer.batch_size=16", "versions.keep=50")
    server = start_server(tmp_path_factory.mktemp("quantized"), "--config", str(CONFIG), *words, *more)
    yield server
    if server.process.poll() is None:
        stop_server(server)


def test_versions_of_it_pass_the_canary_and_serve(quantized: Server):
    conversations = asyncio.run(converse(quantized, 30, 12, seed=3))
    assert sum(conversation.num_failed for conversation in conversations) == 0
    quantized.wait_for("versions", lambda: quantized.status()["journal"]["versions"] >= 2)
    journal = quantized.journal()
    assert {version.kind for version in journal.versions()} == {"lora"}
    swaps = [swap for swap in journal.swaps() if swap.version > 0]
    assert len(swaps) >= 2
    assert all(swap.canary_moved and swap.stall_ms == 0 for swap in swaps), swaps
    assert all(swap.canary_error is not None and swap.canary_error < 0.25 for swap in swaps), swaps


def test_replies_are_the_rounded_weights_with_the_adapter(quantized: Server, base: Path):
    """To what 16 bits round; over the weights from before the rounding the same adapter says otherwise."""
    quantized.wait_for("a version to serve", lambda: quantized.status()["versions"]["serving"] > 0)
    turn = quantized.journal().turn(reply(quantized, 400))
    assert turn is not None
    (span,) = turn.capture.versions
    assert span.version > 0
    folder = str(quantized.run_directory / "versions" / str(span.version))
    asked = (folder, turn.capture.prompt_ids, turn.capture.completion_ids)
    bases = (str(base), model_path("clawrl:tiny"))
    gaps = [np.abs(scored(*asked, base=each) - turn.capture.logprobs).mean() for each in bases]
    assert gaps[0] < min(0.02, gaps[1] / 3), gaps
