"""Actors without their processes: objects on one event loop, behind handles like Ray's, for tests of what actors do.

A process costs seconds and is wanted only by tests that kill it, or look at errors from over the wire: they carry the
marker `processes`, and `actors` (conftest) gives them Ray's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any

import ray

PATIENCE_S = 120.0


class Reference:
    """What a call will return. Awaited on the loop or asked for by `answer`; who gives up waiting cancels nothing."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self.future = future

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(asyncio.wrap_future(self.future)).__await__()


class Handle:
    def __init__(self, loop: asyncio.AbstractEventLoop, made: Any) -> None:
        self._loop, self._made = loop, made

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._loop, getattr(self._made, name))


class _Method:
    def __init__(self, loop: asyncio.AbstractEventLoop, method: Callable[..., Any]) -> None:
        self._loop, self._method = loop, method

    def remote(self, *given: Any, **named: Any) -> Reference:
        return Reference(asyncio.run_coroutine_threadsafe(_called(self._method, *given, **named), self._loop))


async def _called(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    found = function(*given, **named)
    return await found if inspect.isawaitable(found) else found


class Here:
    """Makes such actors; at its end they are closed where they can be, the newest first, and nothing runs on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._handles: list[Handle] = []

    def start(self, kind: type, *given: Any, **options: Any) -> Handle:
        """`options` are Ray's, and mean nothing here."""
        made = asyncio.run_coroutine_threadsafe(_called(kind, *given), self._loop).result(PATIENCE_S)
        self._handles.append(Handle(self._loop, made))
        return self._handles[-1]

    def end(self) -> None:
        for handle in reversed(self._handles):
            if hasattr(handle._made, "close"):
                answer(handle.close.remote())
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def answer(asked: Any) -> Any:
    """What one call returns, or each of several; one that hangs fails."""
    if isinstance(asked, Reference):
        return asked.future.result(PATIENCE_S)
    if isinstance(asked, list):
        return [answer(each) for each in asked]
    return ray.get(asked, timeout=PATIENCE_S)


def is_pending(asked: Any, seconds: float) -> bool:
    """Whether a call has not returned after so many seconds."""
    if isinstance(asked, Reference):
        return not concurrent.futures.wait([asked.future], seconds).done
    return not ray.wait([asked], timeout=seconds)[0]
