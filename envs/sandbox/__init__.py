"""Sandboxes: one interface over bubblewrap, docker, plain namespaces, and (only when asked for) none at all."""

from __future__ import annotations

from envs.sandbox.base import Sandbox, Shell, make_folders
from envs.sandbox.kept import Kept
from envs.sandbox.opening import BACKENDS, close_run, open_sandbox, reconcile, remove_snapshot
from envs.sandbox.spec import GIB, MAX_OUTPUT, ExecResult, SandboxSpec
from envs.sandbox.streams import HeadTail, Process, exchange

__all__ = [
    "BACKENDS",
    "GIB",
    "MAX_OUTPUT",
    "ExecResult",
    "HeadTail",
    "Kept",
    "Process",
    "Sandbox",
    "SandboxSpec",
    "Shell",
    "close_run",
    "exchange",
    "make_folders",
    "open_sandbox",
    "reconcile",
    "remove_snapshot",
]
