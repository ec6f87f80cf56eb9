"""A model that others serve behind an OpenAI-compatible API, as judge and teacher ask it.

Knows HTTP: the key, which refusals pass by themselves, and how long to insist. Ignores what is asked. The key is read
from the environment when it is needed and stands in no message, log or record.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import httpx

from clawrl.config import EndpointSection
from clawrl.errors import ConfigError, JudgeError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 8.0
"""Pauses between repeated requests double from the first to the last, unless the server names one."""
PASSING = frozenset({408, 409, 425, 429})
"""Refusals that pass by themselves, as server errors (5xx) may."""
TOLD = 300
"""Characters kept of what a server says of a refusal."""


class RefusedError(JudgeError):
    """The server refuses this request for good; the same again would be refused again."""


def key_of(settings: EndpointSection) -> str | None:
    """The API key from the environment. Raises ConfigError if it is named and not there."""
    if settings.key_env is None:
        return None
    key = os.environ.get(settings.key_env)
    if not key:
        raise ConfigError(f"key_env={settings.key_env!r} is not set in the environment of {settings.url}'s clients")
    return key


class Endpoint:
    """`settings` must have a url; a request takes `timeout_s` at most, repetitions included."""

    def __init__(self, settings: EndpointSection, timeout_s: float) -> None:
        assert settings.url is not None
        self.url, self._timeout_s, self._key = settings.url, timeout_s, key_of(settings)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=None)  # who asks has a bound of its own
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits)

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that is answered.

        Raises RefusedError where the server will not answer this, and JudgeError where it did not in time.
        """
        deadline, pause, failure = time.monotonic() + self._timeout_s, FIRST_PAUSE_S, "no answer"
        while True:
            pause_s = pause
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    response = await self._client.post(url, json=body)
                if response.is_success:
                    return _object(url, response)
                failure = f"HTTP {response.status_code}: {self._without_key(response.text)[:TOLD]}"
                if response.status_code < 500 and response.status_code not in PASSING:
                    raise RefusedError(f"{url} refuses: {failure}")
                pause_s = max(pause, _asked_pause_s(response))
            except TimeoutError:
                pause_s = self._timeout_s  # it is over, and what failed before says more
            except httpx.HTTPError as error:
                failure = type(error).__name__
            if time.monotonic() + pause_s >= deadline:
                raise JudgeError(f"{url} did not answer within {self._timeout_s:g} s ({failure})")
            log.warning("event=endpoint_asked_again url=%s pause_s=%.1f failure=%s", url, pause_s, failure[:9])
            await asyncio.sleep(pause_s)
            pause = min(2 * pause, LAST_PAUSE_S)

    def _without_key(self, text: str) -> str:
        """Some servers repeat a wrong key in their refusal; and no database stores a NUL."""
        text = text.replace("\x00", " ")
        return text if self._key is None else text.replace(self._key, "[key]")


def _object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RefusedError(f"{url} answers no JSON object; check that it is an OpenAI-compatible API")
    return answer


def _asked_pause_s(response: httpx.Response) -> float:
    """Of `Retry-After` in seconds; 0 where there is none, or it is a date."""
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
