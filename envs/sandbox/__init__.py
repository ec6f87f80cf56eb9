"""Sandboxes: one interface over bubblewrap, docker, plain namespaces, and (only when asked for) none at all."""

from __future__ import annotations

from envs.sandbox.base import Sandbox, Shell
from envs.sandbox.spec import GIB, MAX_OUTPUT, ExecResult, SandboxSpec

__all__ = ["GIB", "MAX_OUTPUT", "ExecResult", "Sandbox", "SandboxSpec", "Shell", "open_sandbox"]


def open_sandbox(spec: SandboxSpec, backend: str = "auto", run: str = "local") -> Sandbox:
    """A running sandbox. backend: auto, bwrap, docker, unshare, or process (no isolation at all; never by auto).

    `run` labels it: the first call for a run removes what killed processes of the same run left on this machine.
    Raises SandboxError with the reason of each backend and what would help.
    """
    raise NotImplementedError
