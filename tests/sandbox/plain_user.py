"""`python plain_user.py SOCKET UID`: the sandbox package as a plain user has it, for tests that run as root.

Starts as root, imports, becomes that user for good, and answers calls: (object, name, arguments, options) → value.
"""

import bz2  # noqa: F401  (what is loaded late could lie where the user may not read)
import ctypes
import encodings.idna  # noqa: F401
import gzip  # noqa: F401
import itertools
import lzma  # noqa: F401
import os
import sys
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil

from envs import sandbox as package
from envs.sandbox import Process, Sandbox, Shell

PROPERTIES = {"alive", "busy", "id", "backend", "unenforced", "spec"}
KEY = b"tests"


class Remote:
    """An object of the other process, used like the object itself; 0 is the package."""

    def __init__(self, address: str, number: int = 0) -> None:
        self._address, self._number = address, number

    def __getattr__(self, name: str) -> Any:
        return self._call(name) if name in PROPERTIES else lambda *words, **options: self._call(name, *words, **options)

    def _call(self, name: str, *words: Any, **options: Any) -> Any:
        with Client(self._address, authkey=KEY) as connection:
            connection.send((self._number, name, words, options))
            kind, value = connection.recv()
        if kind == "error":
            raise value
        return Remote(self._address, value) if kind == "object" else value

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self._call("close")


class Package:
    """What the tests ask of the package."""

    def __getattr__(self, name: str) -> Any:
        return getattr(package, name)

    def memory(self) -> int:
        return psutil.Process().memory_info().rss


def serve(address: str) -> None:
    objects: dict[int, Any] = {0: Package()}
    numbers = itertools.count(1)

    def answer(connection: Connection) -> None:
        with connection:
            number, name, words, options = connection.recv()
            try:
                found = getattr(objects[number], name)
                value = found(*words, **options) if callable(found) else found
            except Exception as error:
                connection.send(("error", error))
                return
            if isinstance(value, Sandbox | Shell | Process):
                objects[number := next(numbers)] = value
                connection.send(("object", number))
            else:
                connection.send(("value", value))

    with Listener(address, authkey=KEY) as listener:
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        while True:
            threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()


def become(uid: int) -> None:
    home = Path(os.environ["CLAWRL_SANDBOX_HOME"])
    home.mkdir(exist_ok=True)
    os.chown(home, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.environ["HOME"] = str(home)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after an exec by that user


if __name__ == "__main__":
    become(int(sys.argv[2]))
    serve(sys.argv[1])
