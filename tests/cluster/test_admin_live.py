"""Acts on real actors: what they answer, and how a refusal comes back."""

import asyncio
from typing import Any

import pytest
import ray

from clawrl.errors import GatewayError, WeightSyncError
from clawrl.serving.admin import act

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


class Lamp:
    """An actor that refuses to be too bright."""

    async def set(self, level: int, colour: str = "white") -> dict[str, Any]:
        if level > 9:
            raise WeightSyncError(f"level={level} is too bright; give at most 9")
        return {"level": 10 // level, "colour": colour}


@pytest.fixture
def acts():
    lamp: Any = ray.remote(Lamp).options(num_cpus=0).remote()
    yield {"light": (lamp, "set")}
    ray.kill(lamp)


def call(acts: Any, name: str, **arguments: Any) -> Any:
    return asyncio.run(act(acts, name, arguments))


def test_an_act_answers(acts):
    assert call(acts, "light", level=5) == {"level": 2, "colour": "white"}


@pytest.mark.parametrize(
    ("name", "arguments", "status", "message"),
    [
        ("dark", {}, 404, "there is no act 'dark'; known are light"),
        ("light", {}, 400, "light cannot be called with .*level"),
        ("light", {"level": 1, "tint": "red"}, 400, "light cannot be called with .*tint"),
        ("light", {"level": 12}, 400, "^level=12 is too bright; give at most 9$"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(acts, name, arguments, status, message):
    with pytest.raises(GatewayError, match=message) as caught:
        call(acts, name, **arguments)
    assert caught.value.status == status


def test_a_failure_is_not_a_refusal(acts):
    with pytest.raises(ZeroDivisionError):
        call(acts, "light", level=0)
