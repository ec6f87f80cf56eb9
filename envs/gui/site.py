"""What a browser may reach: a site, which is a WSGI application on one host, and a task's view of it.

    request ─► route ─► call(app, …) ─► reply        no socket in between

Knows WSGI and the interface of sites. Ignores what they show.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import unquote, urlsplit
from wsgiref.types import WSGIApplication
from wsgiref.util import setup_testing_defaults

from playwright.async_api import Page

from clawrl.rollout.env import Task
from clawrl.types import Message


class Site(ABC):
    """The pages of one episode, and the judge of what was done to them."""

    host: ClassVar[str]
    """Nothing else is reachable."""
    app: WSGIApplication

    @property
    def start_url(self) -> str:
        return f"http://{self.host}/"

    @abstractmethod
    async def begin(self, page: Page) -> str:
        """The instruction, once the first page is there."""

    async def over(self, page: Page) -> bool:
        """Whether the page itself has ended the episode."""
        return False

    @abstractmethod
    async def verdict(self, page: Page) -> float:
        """In [-1, 1]."""

    @abstractmethod
    async def gold(self, page: Page) -> Sequence[Message]:
        """Messages that solve it, written as the first page stands there.

        Raises EnvError where none is known.
        """


@dataclass(frozen=True, slots=True)
class GuiTask(Task):
    """`open` makes its pages in their first state."""

    open: Callable[[], Site]


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def call(app: WSGIApplication, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
    """What a WSGI application answers to a request."""
    parts = urlsplit(url)
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(parts.path or "/"),
        "QUERY_STRING": parts.query,
        "HTTP_HOST": parts.netloc,
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": headers.get("content-type", ""),
        "HTTP_COOKIE": headers.get("cookie", ""),
        "wsgi.input": io.BytesIO(body),
    }
    setup_testing_defaults(environ)
    began: list[tuple[str, list[tuple[str, str]]]] = []
    chunks = app(environ, lambda status, fields, *_: began.append((status, fields)) or (lambda _: None))
    status, fields = began[0]
    return Reply(int(status.split()[0]), tuple(fields), b"".join(chunks))
