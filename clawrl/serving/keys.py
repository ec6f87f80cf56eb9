"""API keys: whose a request is, by the key it carries.

Knows the keys' file, the environment variable, and how a key is made, hashed and found. Ignores HTTP routes and what a
user may do. A key has 256 random bits, so that one SHA-256 keeps it at rest; it is shown once, when it is made.

    clawrl keys add ──► keys.json (hashes, revoked ones too) ──(read again when it changes)──► KeyRing.find
                                                  CLAWRL_API_KEYS ──(at start)──┘

A file that ever had a key demands keys, also when all are revoked: it fails closed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fcntl import LOCK_EX, flock
from pathlib import Path

from clawrl.errors import ConfigError, GatewayError
from clawrl.serving.local import is_loopback, why_not_local

ENVIRONMENT = "CLAWRL_API_KEYS"
"""`user=key` pairs, separated by commas or spaces; the same user may have several."""
FILE = "keys.json"
LOCAL_USER = "local"
_PREFIX = "clawrl-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_SHORTEST = 16


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept: never itself."""

    id: str
    user: str
    sha256: str
    made: float
    revoked: float | None = None


class KeyRing:
    """The keys in force, from a file that may change at any time and from the environment.

    Raises ConfigError if either cannot be read.
    """

    def __init__(self, path: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = path
        self._fixed = _from_environment(environment.get(ENVIRONMENT, ""))
        self._seen: tuple[int, ...] | None = ()
        self._keys: tuple[Key, ...] = ()
        self._refresh()

    @property
    def required(self) -> bool:
        """Whether a request must carry a key."""
        self._refresh()
        return bool(self._keys)

    def find(self, authorization: str | None) -> Key:
        """The key that an `Authorization` header carries. Raises GatewayError 401 if it is none in force."""
        self._refresh()
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unknown("no API key; send it as `Authorization: Bearer <key>` (in SDKs: api_key)")
        digest, found = _digest(key.strip()), None
        for known in self._keys:  # all of them, so that the time says nothing of which
            if hmac.compare_digest(known.sha256, digest) and known.revoked is None:
                found = known
        if found is None:
            raise _unknown("wrong API key, or one that was revoked; ask whoever runs clawrl for one (`clawrl keys`)")
        return found

    def _refresh(self) -> None:
        """Read the file again if it is another one than before; every change replaces it."""
        try:
            found = os.stat(self._path)
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        except FileNotFoundError:
            seen = None
        if seen == self._seen:
            return
        self._keys = (*self._fixed, *read_keys(self._path))
        self._seen = seen


def admit(ring: KeyRing, anyone: bool, peer: str | None, headers: Mapping[str, str]) -> Key | None:
    """The key that a request carries; None where no keys are in use: then only this machine is served, unless
    `anyone` is.

    Raises GatewayError: 401 for a key that is missing or wrong, 403 for who is not on this machine.
    """
    if ring.required:
        return ring.find(headers.get("authorization"))
    why = None if anyone else why_not_local(peer, headers)
    if why is not None:
        raise GatewayError(
            f"without API keys this machine alone is served, {why}; make a key with `clawrl keys add`", status=403
        )
    return None


def require_keys_beyond_loopback(ring: KeyRing, host: str, anyone: bool) -> None:
    """Raises ConfigError if the server would listen to a network without keys, and nobody said that it should."""
    if not (ring.required or anyone or host == "localhost" or is_loopback(host)):
        raise ConfigError(
            f"gateway.host={host} opens the port to the network and there are no API keys; make one with `clawrl keys "
            "add USER`, or set gateway.anyone=true to serve whoever reaches it"
        )


# -- the file --------------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> tuple[Key, ...]:
    """All keys of a file, revoked ones too; none if there is no file. Raises ConfigError if it cannot be read."""
    try:
        return tuple(Key(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["keys"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}); mend it, or delete it and make new keys"
        ) from error


def add_key(path: Path, user: str) -> tuple[Key, str]:
    """Make a key for a user; the record kept, and the key itself, which is kept nowhere. Raises ConfigError."""
    _require_name(user)
    secret = f"{_PREFIX}{secrets.token_urlsafe(32)}"
    added = Key(secrets.token_hex(4), user, _digest(secret), time.time())
    _change(path, lambda keys: (*keys, added))
    return added, secret


def revoke_key(path: Path, id: str) -> Key:
    """Revoke one key. Raises ConfigError if there is none with this id."""
    revoked: list[Key] = []

    def change(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        revoked.extend(replace(key, revoked=key.revoked or time.time()) for key in keys if key.id == id)
        if not revoked:
            known = ", ".join(key.id for key in keys) or "none"
            raise ConfigError(f"there is no key {id!r} in {path}; known are {known}")
        return tuple(revoked[0] if key.id == id else key for key in keys)

    _change(path, change)
    return revoked[0]


def _change(path: Path, change) -> None:
    """Replace the file as a whole, so that a reader never sees half of it; one writer at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            flock(lock, LOCK_EX)
            keys = change(read_keys(path))
            fresh = path.with_suffix(".new")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another --run-root") from error


def _from_environment(text: str) -> tuple[Key, ...]:
    keys = []
    for position, pair in enumerate(re.split(r"[\s,]+", text.strip()) if text.strip() else ()):
        user, separator, secret = pair.partition("=")
        if not separator or len(secret) < _SHORTEST:
            raise ConfigError(
                f"{ENVIRONMENT} entry {position + 1} is not user=key with a key of {_SHORTEST} characters or more"
            )
        _require_name(user)
        keys.append(Key(f"environment-{position + 1}", user, _digest(secret), 0.0))
    return tuple(keys)


def _require_name(user: str) -> None:
    if not _NAME.fullmatch(user):
        raise ConfigError(f"user {user!r} is no name; use up to 64 letters, digits and . _ @ + -")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _unknown(message: str) -> GatewayError:
    return GatewayError(message, status=401, code="invalid_api_key")
