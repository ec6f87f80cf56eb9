"""The engine of a config's [policy] behind vLLM's own OpenAI server: what the gateway is held against.

    python -m jobs.bench.bare PORT [--config FILE] [section.key=value …]

Knows vLLM's server. The engine has the same arguments as the product's, without what captures and swaps.
"""

from __future__ import annotations

import argparse
import asyncio

from clawrl.config import PolicySection, load_config
from clawrl.serving.engine import engine_arguments


async def serve(settings: PolicySection, port: int) -> None:
    """Until it is terminated."""
    arguments = engine_arguments(settings)
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", arguments.model, "--served-model-name", settings.served_name, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert options is not None
    address, socket = setup_server(options, reuse_port=False)
    async with build_async_engine_client_from_engine_args(arguments) as engine:
        await (await build_and_serve(engine, address, socket, options))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.bare")
    parser.add_argument("port", type=int)
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    asyncio.run(serve(load_config(options.config, options.overrides).policy, options.port))


if __name__ == "__main__":
    main()
