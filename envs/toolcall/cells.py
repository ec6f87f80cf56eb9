"""The interpreter inside the sandbox: reads cells as lines of JSON, runs them in one namespace, writes what they write.

    {"code": "x = 2\\nx + 1", "seconds": 10, "marker": "…"} ─► stdout and stderr of the cell, repr of its last
    expression, traceback, in the order they came ─► newline, marker, newline

Standard library only. What it runs may do anything to it: who asks believes nothing but that text came (`interpreter`).
`python cells.py BYTES`: of memory.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class OutOfTimeError(BaseException):
    """No `except Exception` of a cell takes it."""


def main() -> None:
    asked = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(1, 2)
    if len(sys.argv) > 1:
        resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
    signal.signal(signal.SIGALRM, _out_of_time)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, line in enumerate(asked, 1):
        cell = json.loads(line)
        try:
            _run(cell["code"], f"<cell {number}>", cell["seconds"], names)
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError, AttributeError):
                    sys.stdout = os.fdopen(os.dup(1), "w")  # it was closed, or is no stream any more
            os.write(1, f"\n{cell['marker']}\n".encode())


def _run(code: str, name: str, seconds: float, names: dict[str, Any]) -> None:
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None:
                print(repr(value))  # noqa: T201
    except OutOfTimeError:
        _say(f"[stopped after {seconds:g} s; what was defined before is still there]")
    except SystemExit as error:
        _say(f"[SystemExit({error.code!r}): the interpreter goes on]")
    except BaseException as error:
        _say("".join(traceback.format_exception(type(error), error, _own(error.__traceback__))).rstrip())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _own(trace: TracebackType | None) -> TracebackType | None:
    """From the cell's first frame on."""
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<cell "):
        trace = trace.tb_next
    return trace


def _say(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os.write(1, f"{text}\n".encode(errors="replace"))


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


if __name__ == "__main__":
    main()
