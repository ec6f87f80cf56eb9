"""A real browser, and what these tests do with it again and again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lacking import lacking
from playing import browsers

from clawrl.errors import EnvError
from envs.gui.browser import find_browser
from envs.gui.env import GuiEnv


@pytest.fixture(scope="session", autouse=True)
def browser() -> str:
    """It is missing on some users' machines, where the tests are skipped, but never in CI."""
    try:
        return find_browser()
    except EnvError as error:
        lacking(error)


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[GuiEnv]:
    """Keeps the browser running between the tests of a module."""
    env = GuiEnv("buttons/one")
    env.reset(options={"task": 0})
    yield env
    env.close()
    assert not browsers(), "a browser was left running"


@pytest.fixture
def opened() -> Iterator[Callable[..., GuiEnv]]:
    """Environments at the first page of task 0 of a family; all are closed at the end."""
    envs: list[GuiEnv] = []

    def open_env(family: str, **options: Any) -> GuiEnv:
        envs.append(GuiEnv(family, **options))
        envs[-1].reset(options={"task": 0})
        return envs[-1]

    yield open_env
    for env in envs:
        env.close()
