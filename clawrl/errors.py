"""The exception tree, and `boundary`, which attributes a foreign failure to the component it crossed.

A message gives what went wrong, the value, and the remedy. Every exception survives pickling, since it crosses
processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ClawrlError(Exception):
    """Base of all errors raised on purpose by clawrl."""


class ConfigError(ClawrlError):
    """The configuration, or what it points to, cannot work. Raised before any actor starts."""


class GatewayError(ClawrlError):
    """A request cannot be served as it stands; `status` and `param` shape the OpenAI error body.

    `retry_after` says in how many seconds it may be.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.status, self.param, self.code, self.retry_after)

    def body(self) -> dict:
        """The error in OpenAI's shape."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class PolicyError(ClawrlError):
    """The serving engine of the policy failed."""


class JudgeError(ClawrlError):
    """The judge or teacher failed; the term it would have given is dropped."""


class MethodError(ClawrlError):
    """A user's own learning method failed on a turn, which makes no sample."""


class EnvError(ClawrlError):
    """An environment failed; its episode is data with a status."""


class SandboxError(EnvError):
    """A sandbox could not be made, or broke."""


class JournalError(ClawrlError):
    """The durable log refused or failed."""


class WithdrawnError(JournalError):
    """A version learnt from turns whose users opted out, or had them erased, while it was being trained."""


class WeightSyncError(ClawrlError):
    """A version could not be published, or a replica serves something else than it says."""


@contextmanager
def boundary(kind: type[ClawrlError], what: str) -> Iterator[None]:
    """Re-raise any foreign exception as `kind`, saying what was being done; ours pass unchanged."""
    try:
        yield
    except ClawrlError:
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error
