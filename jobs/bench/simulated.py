"""An environment that only takes time, and agents that need no model: what is left then is the pool's own work.

Knows `AgentEnv` and `EnvWorker`. Ignores what is measured with them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from clawrl.config import PoolSection
from clawrl.rollout.agent import Limits
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task, draw
from clawrl.rollout.worker import EnvWorker, make_env
from clawrl.types import Message

STEPS = 20
SHORTEST_S, LONGEST_S = 0.05, 0.5
MEAN_S = (SHORTEST_S + LONGEST_S) / 2


class SimulatedEnv(AgentEnv[Task]):
    """An episode of STEPS steps, each of which sleeps for a time drawn from SHORTEST_S to LONGEST_S."""

    name = "simulated"

    def __init__(self) -> None:
        super().__init__()
        self._random, self._steps = np.random.default_rng(), 0

    def make_task(self, number: int, split: Split) -> Task:
        return Task(f"simulated/{split}/{number}")

    def begin(self, task: Task) -> Opening:
        self._steps = 0
        return Opening(({"role": "user", "content": "go on"},))

    def act(self, action: Message) -> Answer:
        time.sleep(self._random.uniform(SHORTEST_S, LONGEST_S))
        self._steps += 1
        return Answer(({"role": "user", "content": "go on"},), terminated=self._steps == STEPS)

    def grade(self) -> float:
        return float(draw(self._steps).uniform(-1, 1))

    def gold(self, task: Task) -> Sequence[Message]:
        return [{"role": "assistant", "content": "on"}] * STEPS


gymnasium.register("clawrl/Simulated-v0", entry_point="jobs.bench.simulated:SimulatedEnv", order_enforce=False)


class GoldAgent:
    """Says what solves the task, at once: in a `Caller`'s place."""

    def __init__(self, settings: PoolSection) -> None:
        self._env: Any = make_env(settings).unwrapped
        self._solutions: dict[str, Sequence[Message]] = {}

    async def reply(self, attempt: Attempt, messages: list[Message], tools: tuple[Any, ...], limits: Limits) -> Message:
        solution = self._solutions.get(attempt.session)
        if solution is None:
            task = self._env.make_task(attempt.number, attempt.split)
            solution = self._solutions[attempt.session] = self._env.gold(task)
        number = sum(message["role"] == "assistant" for message in messages)
        if number + 1 >= len(solution):
            del self._solutions[attempt.session]
        return solution[min(number, len(solution) - 1)]


class GoldWorker(EnvWorker):
    """A pool's worker with such an agent in it."""

    def __init__(self, settings: PoolSection) -> None:
        super().__init__(settings, "http://127.0.0.1:0", "none")
        self._caller: Any = GoldAgent(settings)
