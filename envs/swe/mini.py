"""mini-swe-agent plays an episode: a program that only knows a base URL, in the place of our own turn loop.

Its loop, prompts and configuration (`swebench.yaml`) are its own. Commands run in our sandbox, and replies come by an
OpenAI client: its own models go through litellm, 200 MB that a gateway of OpenAI's shape has no need of. What it prints
as its submission is not looked at; the environment judges the work tree, as for any other agent.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium
import openai
import yaml

from envs.sandbox import Sandbox
from envs.swe.task import REPO

os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")  # both are read, and the folder made, when it is imported
os.environ.setdefault("MSWEA_GLOBAL_CONFIG_DIR", os.path.join(tempfile.gettempdir(), "mini-swe-agent"))

from minisweagent.agents.default import DefaultAgent
from minisweagent.config import get_config_path
from minisweagent.exceptions import Submitted
from minisweagent.models.utils.actions_toolcall import (
    BASH_TOOL,
    format_toolcall_observation_messages,
    parse_toolcall_actions,
)

DONE = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
FIELDS = {"role", "content", "tool_calls"}


class Limits(Protocol):
    """Of an episode (`rollout.agent.Limits` is one)."""

    @property
    def turns(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def reply_tokens(self) -> int: ...


def play(
    env: gymnasium.Env, base_url: str, api_key: str, model: str, extra_headers: Mapping[str, str], limits: Limits
) -> str | None:
    """Play the episode that `env` (a SweEnv) was reset to, up to its submission or a limit; it is then to be graded.

    Returns why it broke off; None if it submitted.

    Raises openai.OpenAIError if there is no reply, SandboxError if the sandbox breaks.
    """
    swe: Any = env.unwrapped
    config = yaml.safe_load(get_config_path("swebench").read_text(encoding="utf-8"))
    shown = {name: config["model"][name] for name in ("observation_template", "format_error_template")}
    kept = {name: config["agent"][name] for name in ("system_template", "instance_template")}
    with openai.OpenAI(
        base_url=base_url, api_key=api_key, default_headers=dict(extra_headers), timeout=limits.seconds, max_retries=0
    ) as client:
        agent = DefaultAgent(
            OpenAIModel(client, model, limits.reply_tokens, **shown),
            SandboxEnvironment(swe.sandbox, config["environment"]["timeout"]),
            step_limit=limits.turns, wall_time_limit_seconds=max(1, int(limits.seconds)), cost_limit=0.0, **kept,
        )  # fmt: skip
        status = agent.run(task=swe.task.statement)["exit_status"]
    return None if status == "Submitted" else status


class SandboxEnvironment:
    """minisweagent.Environment: every action in a shell of its own."""

    config: Any = None

    def __init__(self, sandbox: Sandbox, seconds: float) -> None:
        self._sandbox, self._seconds = sandbox, seconds

    def execute(self, action: dict, cwd: str = "") -> dict[str, Any]:
        """Raises minisweagent's Submitted when a command says that the work is done."""
        command = str(action.get("command", "")).replace("\0", "")
        command = f"cd {shlex.quote(cwd or REPO)}\n{command}"  # where it was removed, bash says so
        done = self._sandbox.exec(["bash", "-c", command], self._seconds, cwd="/")
        first, _, rest = done.output.lstrip().partition("\n")
        if first.strip() == DONE and done.ok:
            raise Submitted(
                {"role": "exit", "content": rest, "extra": {"exit_status": "Submitted", "submission": rest}}
            )
        said = f"the command took longer than {self._seconds:g} s" if done.timed_out else ""
        return {"output": done.output, "returncode": -1 if done.code is None else done.code, "exception_info": said}

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return {}

    def serialize(self) -> dict:
        return {}


class OpenAIModel:
    """minisweagent.Model over an OpenAI client; how replies are read and results are written is mini-swe-agent's."""

    config: Any = None

    def __init__(
        self, client: openai.OpenAI, model: str, tokens: int, observation_template: str, format_error_template: str
    ) -> None:
        self._client, self._model, self._tokens = client, model, tokens
        self._observation, self._format_error = observation_template, format_error_template

    def query(self, messages: list[dict], **_: Any) -> dict:
        """The assistant message, with its commands in `extra`. Raises minisweagent's FormatError."""
        sent: Any = [{name: value for name, value in message.items() if name != "extra"} for message in messages]
        tools: Any = [BASH_TOOL]
        choice = self._client.chat.completions.create(
            model=self._model, messages=sent, tools=tools, max_completion_tokens=self._tokens
        ).choices[0]
        actions = parse_toolcall_actions(
            choice.message.tool_calls or [],
            format_error_template=self._format_error,
            template_kwargs={"finish_reason": choice.finish_reason},
        )
        reply = choice.message.model_dump(exclude_none=True, include=FIELDS)
        return {**reply, "extra": {"actions": actions, "cost": 0.0}}

    def format_message(self, **fields: Any) -> dict:
        return fields

    def format_observation_messages(
        self, message: dict, outputs: list[dict], template_vars: dict | None = None
    ) -> list[dict]:
        return format_toolcall_observation_messages(
            actions=message["extra"]["actions"],
            outputs=outputs,
            observation_template=self._observation,
            template_vars=template_vars,
        )

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return {}

    def serialize(self) -> dict:
        return {}
