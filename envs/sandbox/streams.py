"""Talking to a process through file descriptors: bounded output, input that never deadlocks, a deadline.

Knows nothing of where the process runs. Memory stays flat however much it writes.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

CHUNK = 1 << 16
IDLE = 0.5
"""Seconds between looks at a process that writes nothing and has no descriptor that tells its end."""


LEFTOVER = 1.0
"""Seconds for which output is still read after the command itself ended, when a daemon of its goes on writing."""


class HeadTail:
    """The first and the last bytes of a stream, `limit` in all."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._head, self._tail = bytearray(), bytearray()
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data[-self._half :]
            if len(self._tail) > 2 * self._half:
                del self._tail[: -self._half]

    @property
    def truncated(self) -> bool:
        return self.num_bytes > 2 * self._half

    def text(self) -> str:
        """What was kept; invalid UTF-8 is replaced."""
        tail = bytes(self._tail[-self._half :])
        if not self.truncated:
            return (bytes(self._head) + tail).decode("utf-8", "replace")
        left_out = self.num_bytes - len(self._head) - len(tail)
        head, end = bytes(self._head).decode("utf-8", "replace"), tail.decode("utf-8", "replace")
        return f"{head}\n[... {left_out} bytes left out ...]\n{end}"


class Process(ABC):
    """A started command. `receive` and `send` do not block; descriptors say when they are worth calling."""

    pid: int | None = None
    """Of its first process, as this machine sees it; None if it runs elsewhere."""

    @abstractmethod
    def outputs(self) -> Iterable[int]:
        """Descriptors that are still open for reading."""

    @abstractmethod
    def input(self) -> int | None:
        """Descriptor for writing; None once it is closed."""

    @abstractmethod
    def receive(self, descriptor: int) -> list[tuple[int, bytes]]:
        """What there is to read: (1 for stdout, 2 for stderr; bytes). At the end the descriptor leaves `outputs`."""

    @abstractmethod
    def send(self, data: bytes) -> int:
        """Write as much as goes; raises BrokenPipeError when nobody reads."""

    @abstractmethod
    def close_input(self) -> None: ...

    @abstractmethod
    def ended(self) -> bool:
        """Whether the command itself has ended (what it left behind may go on)."""

    def end_descriptor(self) -> int | None:
        """Becomes readable when the command ends."""
        return None

    @abstractmethod
    def code(self) -> int | None:
        """Exit status as a shell would say it. Raises SandboxError if the command could not be started."""

    @abstractmethod
    def kill(self) -> None:
        """End it and its descendants; those that became daemons live until the sandbox is reset."""

    @abstractmethod
    def kill_below(self) -> None:
        """End what the command started, not itself."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all descriptors."""


def exchange(
    process: Process,
    data: bytes | memoryview,
    deadline: float,
    on_output: Callable[[int, bytes], bool],
    *,
    close_input: bool = True,
) -> bool:
    """Write `data`, hand over what comes, until the command ended or `on_output` says that is enough.

    False when the deadline (monotonic) passed first.
    """
    waiting = memoryview(data)
    leftover = float("inf")
    ended = False
    while True:
        if not waiting and close_input and process.input() is not None:
            process.close_input()
        ready = _ready(process, bool(waiting), 0.0 if ended else deadline)
        for descriptor in ready:
            if descriptor == process.input() and waiting:
                try:
                    waiting = waiting[process.send(bytes(waiting[:CHUNK])) :]
                except OSError:  # it does not want more
                    waiting = memoryview(b"")
            elif descriptor in process.outputs():
                enough = [on_output(stream, piece) for stream, piece in process.receive(descriptor)]
                if any(enough):
                    return True
        if not list(process.outputs()) and not (waiting and process.input() is not None):
            return _await_end(process, deadline)
        busy = any(each in process.outputs() for each in ready)
        if ended:
            leftover = min(leftover, time.monotonic() + LEFTOVER)
            if not busy or time.monotonic() > leftover:
                return True
        elif (not busy or process.end_descriptor() in ready) and process.ended():
            ended = True  # its last words may have come since the look: there is one more
        elif time.monotonic() >= deadline:
            return False


def _ready(process: Process, writing: bool, deadline: float) -> list[int]:
    """Descriptors that can be read, or written if there is something to write; waits at most IDLE."""
    with selectors.DefaultSelector() as selector:
        for descriptor in process.outputs():
            selector.register(descriptor, selectors.EVENT_READ)
        entry, end = process.input(), process.end_descriptor()
        if writing and entry is not None:
            with suppress(KeyError):
                selector.register(entry, selectors.EVENT_WRITE)
                entry = None
            if entry is not None:  # one socket for both directions
                selector.modify(entry, selectors.EVENT_READ | selectors.EVENT_WRITE)
        if end is not None:
            selector.register(end, selectors.EVENT_READ)
        wait = max(0.0, min(deadline - time.monotonic(), IDLE))
        return [key.fd for key, _ in selector.select(wait)]


def wait_for_one(process: Process, seconds: float) -> None:
    """Until there is something to read, at most so long."""
    _ready(process, False, time.monotonic() + seconds)


def _await_end(process: Process, deadline: float) -> bool:
    """A command may close its output and go on."""
    pause = 0.0005
    while not process.ended():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


class LocalProcess(Process):
    """A child of ours, on pipes or on a pty whose master we hold."""

    def __init__(self, child: subprocess.Popen[bytes], master: int | None = None) -> None:
        self.child, self.pid = child, child.pid
        self._end = os.pidfd_open(child.pid)
        self._input: int | None
        if master is not None:
            self._input, self._outputs = master, {master: 1}
        else:
            assert child.stdin is not None
            assert child.stdout is not None
            self._input = child.stdin.fileno()
            self._outputs = {child.stdout.fileno(): 1}
            if child.stderr is not None:
                self._outputs[child.stderr.fileno()] = 2
        self._master = master
        for descriptor in {self._input, *self._outputs}:
            os.set_blocking(descriptor, False)

    def outputs(self) -> Iterable[int]:
        return tuple(self._outputs)

    def input(self) -> int | None:
        return self._input

    def receive(self, descriptor: int) -> list[tuple[int, bytes]]:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return []
        except OSError:  # EIO: the last holder of a pty's other side has gone
            data = b""
        if not data:
            stream = self._outputs.pop(descriptor)
            return [(stream, b"")]
        return [(self._outputs[descriptor], data)]

    def send(self, data: bytes) -> int:
        if self._input is None:
            raise BrokenPipeError
        try:
            return os.write(self._input, data)
        except BlockingIOError:
            return 0

    def close_input(self) -> None:
        if self._master is None and self._input is not None and self.child.stdin is not None:
            with suppress(OSError):
                self.child.stdin.close()
        self._input = None

    def ended(self) -> bool:
        return self.child.poll() is not None

    def end_descriptor(self) -> int | None:
        return self._end

    def code(self) -> int | None:
        status = self.child.poll()
        return status if status is None or status >= 0 else 128 - status

    def kill(self) -> None:
        if not self.ended():
            kill_tree(self.child.pid)
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(5)

    def kill_below(self) -> None:
        if not self.ended():
            kill_tree(self.child.pid, itself=False)

    def close(self) -> None:
        self.close_input()
        self._outputs.clear()
        for stream in (self.child.stdout, self.child.stderr):
            if stream is not None:
                stream.close()
        if self._master is not None:
            os.close(self._master)
            self._master = None
        if self._end >= 0:
            os.close(self._end)
            self._end = -1


def descendants(pid: int) -> list[int]:
    """Of a process of this machine, parents first."""
    found, waiting = [], [pid]
    while waiting:
        with suppress(OSError):
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                with suppress(OSError, ValueError):
                    children = [int(word) for word in (task / "children").read_text().split()]
                    found += children
                    waiting += children
    return found


def kill_tree(pid: int, *, itself: bool = True, rounds: int = 50) -> None:
    """SIGKILL to a process and its descendants.

    All are stopped first, parents before children, until no new one turns up: a parent that sees its child end goes on.
    """
    found: dict[int, None] = {pid: None} if itself else {}
    _signal(found, signal.SIGSTOP)
    for _ in range(rounds):
        new = [each for each in descendants(pid) if each not in found]
        if not new:
            break
        _signal(new, signal.SIGSTOP)
        found |= dict.fromkeys(new)
    _signal(found, signal.SIGKILL)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)
