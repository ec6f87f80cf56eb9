"""What tests do with environments again and again."""

from contextlib import suppress
from typing import Any

import psutil

from clawrl.rollout.env import message_of
from envs.gui.env import GuiEnv


def browsers() -> list[psutil.Process]:
    """The browser processes that this one started."""
    return [each for each in psutil.Process().children(recursive=True) if is_browser(each)]


def is_browser(process: psutil.Process) -> bool:
    """Debian starts the program from a script, which has the same name and ends with it."""
    with suppress(psutil.NoSuchProcess):
        return "chrom" in process.exe()
    return False


def said(env: GuiEnv, name: str, **arguments: Any) -> str:
    """What an action is answered with."""
    messages, *_ = env.step(message_of(name, **arguments))
    return messages[0]["content"]


def played(env: GuiEnv, messages: Any) -> float | None:
    """The outcome after these actions."""
    for message in messages:
        *_, terminated, _, facts = env.step(message)
        if terminated:
            return facts["outcome"]
    return None
