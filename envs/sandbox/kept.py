"""One sandbox after the other, each as its image has it: reset where it can be, else opened anew."""

from __future__ import annotations

from contextlib import suppress

from clawrl.errors import SandboxError
from envs.sandbox.base import Sandbox
from envs.sandbox.opening import open_sandbox
from envs.sandbox.spec import SandboxSpec


class Kept:
    """Holds at most one; `backend` and `run` are those of `open_sandbox`."""

    def __init__(self, backend: str, run: str) -> None:
        self._backend, self.run = backend, run
        self.sandbox: Sandbox | None = None

    def again(self, spec: SandboxSpec | None = None) -> Sandbox | None:
        """The one there is, back at its image; None, and then there is none, if it is of another `spec` or broken."""
        if self.sandbox is not None and spec in (None, self.sandbox.spec):
            with suppress(SandboxError):  # what the last episode broke must not end the next
                self.sandbox.reset()
                return self.sandbox
        self.close()
        return None

    def open(self, spec: SandboxSpec) -> Sandbox:
        """A new one, where there is none. Raises as `open_sandbox`."""
        self.sandbox = open_sandbox(spec, self._backend, self.run)
        return self.sandbox

    def close(self) -> None:
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None
