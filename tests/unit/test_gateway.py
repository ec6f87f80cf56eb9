"""What a request must hold before anything is generated or journalled."""

import pytest
from fastapi import Request

from clawrl.config import PolicySection
from clawrl.errors import GatewayError
from clawrl.serving.bodies import read_json, validate_chat

USER = {"role": "user", "content": "hi"}
SETTINGS = PolicySection(served_name="clawrl")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "messages must be a list"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": "hi"}, 400, "messages must be a list"),
        ({"messages": ["hi"]}, 400, r"messages\[0\].role is None"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, 400, r"messages\[1\].role is 'robot'; use one of"),
        ({"messages": [USER], "model": "gpt-9"}, 404, "model 'gpt-9' is not served here; use 'clawrl'"),
        ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens=0 is not a positive"),
        ({"messages": [USER], "max_completion_tokens": -3}, 400, "max_completion_tokens=-3"),
        ({"messages": [USER], "max_tokens": "many"}, 400, "max_tokens='many'"),
        ({"messages": [USER], "max_tokens": True}, 400, "max_tokens=True"),
        ({"messages": [USER], "temperature": -0.1}, 400, "temperature=-0.1 is outside 0 to 2"),
        ({"messages": [USER], "temperature": "hot"}, 400, "temperature='hot'"),
        ({"messages": [USER], "n": 9}, 400, "n=9 is more than policy.max_choices=8"),
        ({"messages": [USER], "n": 0}, 400, "n=0 is not a positive"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, r"messages\[0\].content is neither"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 400, r"messages\[0\].content is neither"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, 400, r"messages\[0\].tool_calls is no list"),
        ({"messages": [USER], "tools": {}}, 400, "tools is no list"),
        ({"messages": [USER], "stream": "yes"}, 400, "stream='yes'"),
    ],
)
def test_a_bad_request_is_refused_with_value_and_remedy(body, status, message):
    with pytest.raises(GatewayError, match=message) as caught:
        validate_chat(body, SETTINGS)
    assert caught.value.status == status
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_plain_request_passes_and_gets_the_served_model():
    body = {"messages": [USER], "max_tokens": None, "temperature": 0, "n": 1, "unknown_key": {"is": "tolerated"}}
    validate_chat(body, SETTINGS)
    assert body["model"] == "clawrl"


class Upload:
    """A chunked body, which says no length."""

    def __init__(self, *parts: bytes) -> None:
        self.left = list(parts)

    def request(self, **headers: str) -> Request:
        sent = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        raw = [(name.encode(), value.encode()) for name, value in sent.items()]
        return Request({"type": "http", "headers": raw}, self._receive)

    async def _receive(self) -> dict:
        body = self.left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.left)}


async def test_a_chunked_body_is_read_no_further_than_its_limit():
    upload = Upload(b'"', *[b"x" * 2**19] * 100)
    with pytest.raises(GatewayError, match="larger than 1 MiB; send less history") as caught:
        await read_json(upload.request(), 1)
    assert caught.value.status == 413
    assert len(upload.left) == 98
    with pytest.raises(GatewayError, match="larger than 1 MiB"):
        await read_json(Upload().request(content_length=str(2**20 + 1)), 1)


async def test_a_body_in_pieces_is_one():
    assert await read_json(Upload(b'{"a":', b"", b" 1}").request(), 1) == {"a": 1}
    with pytest.raises(GatewayError, match="the body is not valid JSON"):
        await read_json(Upload(b"{").request(), 1)
