"""An environment of two steps that gets into a trouble of choice, once or each time, and writes down who was there."""

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import gymnasium

from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task
from clawrl.types import Message


class OddEnv(AgentEnv[Task]):
    """`folder/log` has a line `act pid` per call; a trouble with `once` befalls whoever makes the file `once` first."""

    name = "odd"

    def __init__(
        self, folder: str, trouble: str = "", at: str = "step", once: bool = False, seconds: float = 0, naps: float = 1
    ) -> None:
        super().__init__()
        self._folder, self._trouble, self._at, self._once = Path(folder), trouble, at, once
        self._seconds, self._naps, self._steps = seconds, naps, 0

    def make_task(self, number: int, split: Split) -> Task:
        return Task(f"odd/{number}")

    def begin(self, task: Task) -> Opening:
        self._steps = 0
        self._enter("reset")
        return Opening(({"role": "user", "content": "say anything, twice"},))

    def act(self, action: Message) -> Answer:
        self._enter("step")
        time.sleep(self._seconds)
        self._steps += 1
        return Answer(({"role": "user", "content": "again"},), terminated=self._steps == 2)

    def grade(self) -> float:
        self._enter("grade")
        return self._steps / 2

    def gold(self, task: Task) -> Sequence[Message]:
        return [{"role": "assistant", "content": "anything"}] * 2

    def close(self) -> None:
        self._enter("close")

    def _enter(self, where: str) -> None:
        with (self._folder / "log").open("a") as log:
            log.write(f"{where} {os.getpid()}\n")
        if where == self._at and self._trouble and self._mine():
            self._be_in_trouble()

    def _mine(self) -> bool:
        try:
            (self._folder / "once").touch(exist_ok=not self._once)
        except FileExistsError:
            return False
        return True

    def _be_in_trouble(self) -> None:
        if self._trouble == "raise":
            raise RuntimeError("odd things\nhappen")
        if self._trouble == "kill":
            os.kill(os.getpid(), 9)
        if self._trouble == "nap":
            time.sleep(self._naps)
        if self._trouble == "hang":  # this thread alone
            time.sleep(600)
        if self._trouble == "freeze":  # the whole process: nobody else gets Python's lock
            ctypes.PyDLL(None).sleep(600)


gymnasium.register("clawrl/Odd-v0", entry_point="odd_env:OddEnv", order_enforce=False)
