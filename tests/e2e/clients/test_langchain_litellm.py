"""LangChain and LiteLLM, unmodified, in an environment of their own, against the real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LANGCHAIN = """
import json, sys
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from typing import Literal

class Answer(BaseModel):
    "How many apples."
    apples: Literal[7, 8]

@tool
def lookup(item: str, place: str) -> str:
    "Count of an item at a place."
    return "42"

model = ChatOpenAI(model="clawrl", base_url=sys.argv[1], api_key="none", max_tokens=100, timeout=120)
talk = [HumanMessage("LangChain: 3 apples and 4 more?")]
first = model.invoke(talk)
talk += [first, HumanMessage("Are you sure?")]
second = model.invoke(talk)
streamed = "".join(chunk.content for chunk in model.stream("LangChain: count to three."))
structured = model.with_structured_output(Answer, method="json_schema").invoke("LangChain: 3 and 4?")
question = 'How many "pears" are at "market" and "barn" together?'
called = model.bind_tools([lookup], tool_choice="any", temperature=0).invoke(question)
back = model.invoke([HumanMessage(question), called,
                     ToolMessage("42", tool_call_id=called.tool_calls[0]["id"])])
print(json.dumps({
    "ids": [first.response_metadata["id"] if "id" in first.response_metadata else first.id,
            second.response_metadata["id"] if "id" in second.response_metadata else second.id],
    "tools": [called.response_metadata.get("id") or called.id, back.response_metadata.get("id") or back.id],
    "streamed": streamed, "apples": structured.apples, "tool": called.tool_calls[0]["name"],
}))
"""

LITELLM = """
import json, sys
import litellm

asked = {"model": "openai/clawrl", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 60, "timeout": 120}
talk = [{"role": "user", "content": "LiteLLM: 3 apples and 4 more?"}]
first = litellm.completion(messages=talk, **asked)
talk += [first.choices[0].message.model_dump(), {"role": "user", "content": "Are you sure?"}]
second = litellm.completion(messages=talk, **asked)
chunks = list(litellm.completion(messages=[{"role": "user", "content": "LiteLLM: hi"}], stream=True, **asked))
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
print(json.dumps({"ids": [first.id, second.id], "streamed": streamed, "ended": chunks[-1].choices[0].finish_reason}))
"""


def run(python: Path, program: str, server: Server) -> dict[str, Any]:
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "PYTHONPATH": ""}
    ended = subprocess.run(
        [str(python), "-c", program, f"{server.url}/v1"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, **quiet},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def assert_paired(server: Server, first: str, second: str) -> None:
    turn = server.journal().turn(second)
    assert turn is not None, second
    assert (turn.parent, turn.kind) == (first, "main"), turn.reason


def test_langchain(server: Server, client_python: Path):
    told = run(client_python, LANGCHAIN, server)
    assert_paired(server, *told["ids"])
    assert_paired(server, *told["tools"])
    assert told["streamed"]
    assert told["apples"] in (7, 8)
    assert told["tool"] == "lookup"


def test_litellm(server: Server, client_python: Path):
    told = run(client_python, LITELLM, server)
    assert_paired(server, *told["ids"])
    assert told["streamed"]
    assert told["ended"] in ("stop", "length")
