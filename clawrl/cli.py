"""The `clawrl` command: parse, call, show. Thin: everything it starts is in `main`, everything it shows is HTTP."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clawrl.commands import doctor, forget, journal, judge, keys, play, quantize, sessions, train_judge, versions
from clawrl.commands.client import add_url, get, nobody
from clawrl.config import load_config
from clawrl.errors import ClawrlError, ConfigError
from clawrl.observe import set_up_logging

console = Console(stderr=True, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 well, 1 failed, 2 wrong use or config, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    set_up_logging()
    try:
        return options.run(options)
    except ClawrlError as error:
        console.print(f"[bold red]clawrl[/bold red] {escape(str(error))}")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clawrl", description="Serve a model, learn from its use, swap in the better."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the policy and train it in the background until Ctrl-C")
    add_config_options(serve)
    serve.set_defaults(run=_serve)
    chat = commands.add_parser("chat", help="talk to a running clawrl in the terminal")
    add_url(chat)
    chat.set_defaults(run=_chat)
    status = commands.add_parser("status", help="versions, buffer and losses of a running clawrl")
    add_url(status)
    status.add_argument("--json", action="store_true", help="print what /status says as it is")
    status.set_defaults(run=_status)
    forget.add(commands)
    keys.add(commands)
    versions.add(commands)
    journal.add(commands)
    sessions.add(commands)
    judge.add(commands)
    train_judge.add(commands)
    quantize.add(commands)
    doctor.add(commands)
    play.add(commands)
    return parser


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--config, --method and dotted overrides, the same for every command that starts a system."""
    parser.add_argument("--config", metavar="FILE", help="TOML file (default: the embedded CPU configuration)")
    parser.add_argument("--method", choices=("rl", "opd", "hybrid"), help="objective; short for learning.method=…")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def config_of(options: argparse.Namespace) -> Any:
    """The config that --config, --method and the overrides describe. Raises ConfigError."""
    method = [f"learning.method={options.method}"] if options.method else []
    return load_config(options.config, [*method, *options.overrides])


def _serve(options: argparse.Namespace) -> int:
    config = config_of(options)
    from clawrl.main import serve_until_stopped  # vLLM, Ray and torch load only when needed

    serve_until_stopped(config, lambda line: console.print(f"[bold]clawrl[/bold] {escape(line)}", soft_wrap=True))
    return 0


def _status(options: argparse.Namespace) -> int:
    status = get(options.url, "/status")
    if options.json:
        print(json.dumps(status, indent=2))
        return 0
    table = Table(show_header=False, box=None)
    for component, facts in status.items():
        shown = facts if isinstance(facts, dict) else {"": facts}
        for key, value in shown.items():
            table.add_row(component, key, _told(value))
            component = ""
    Console().print(table)
    return 0


def _told(value: Any) -> str:
    """A value on one line, numbers to four digits."""
    if isinstance(value, dict):
        return "  ".join(f"{key}={_told(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _chat(options: argparse.Namespace) -> int:
    """A conversation with streamed replies; each message of yours is what the reply before it learns from."""
    import openai

    key = os.environ.get("CLAWRL_API_KEY", "none")
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key=key)
    try:
        model = client.models.list().data[0].id
    except openai.APIStatusError as error:
        raise ClawrlError(f"{error.message} (`clawrl chat` takes the key in CLAWRL_API_KEY)") from None
    except openai.APIConnectionError as error:
        raise nobody(options.url, error) from None
    messages: list[Any] = []
    console.print("[dim]An empty line or Ctrl-D ends the conversation.[/dim]")
    while text := _ask():
        messages.append({"role": "user", "content": text})
        try:
            reply = _stream(client, model, messages)
        except openai.APIError as error:
            messages.pop()
            console.print(f"[red]{error.message}[/red]")
            continue
        messages.append({"role": "assistant", "content": reply})
    return 0


def _ask() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def _stream(client: Any, model: str, messages: list[Any]) -> str:
    parts: list[str] = []
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        if chunk.choices and (text := chunk.choices[0].delta.content):
            parts.append(text)
            print(text, end="", flush=True)
    print()
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
