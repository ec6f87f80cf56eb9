"""The exception tree: it survives processes, says OpenAI's shape, and attributes foreign failures."""

import pickle

import pytest

from clawrl import errors
from clawrl.errors import ClawrlError, GatewayError, JournalError, SandboxError, boundary

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ClawrlError)]


def test_the_tree_is_complete():
    names = {kind.__name__ for kind in KINDS}
    assert names >= {"ConfigError", "GatewayError", "PolicyError", "JudgeError", "EnvError", "SandboxError"}
    assert issubclass(SandboxError, errors.EnvError)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    again = pickle.loads(pickle.dumps(kind("buffer.max_lag=0 refuses every sample; set it to 1 or more")))
    assert type(again) is kind
    assert str(again) == "buffer.max_lag=0 refuses every sample; set it to 1 or more"


def test_a_gateway_error_keeps_its_shape_through_pickling():
    error = GatewayError("max_tokens=-1 is below 1; give at least 1", 400, "max_tokens", "invalid_value")
    assert (
        pickle.loads(pickle.dumps(error)).body()
        == error.body()
        == {
            "error": {
                "message": "max_tokens=-1 is below 1; give at least 1",
                "type": "invalid_request_error",
                "param": "max_tokens",
                "code": "invalid_value",
            }
        }
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_status_names_the_kind(status, kind):
    assert GatewayError("x", status).body()["error"]["type"] == kind


def test_boundary_attributes_a_foreign_failure():
    told = "append of 3 records: OSError: no space left"
    with pytest.raises(JournalError, match=told) as caught, boundary(JournalError, "append of 3 records"):
        raise OSError("no space left")
    assert isinstance(caught.value.__cause__, OSError)


def test_boundary_lets_ours_pass_unchanged():
    ours = GatewayError("unknown model", 404)
    with pytest.raises(GatewayError) as caught, boundary(JournalError, "append"):
        raise ours
    assert caught.value is ours


def test_boundary_lets_interruption_pass():
    with pytest.raises(KeyboardInterrupt), boundary(JournalError, "append"):
        raise KeyboardInterrupt
