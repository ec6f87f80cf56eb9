"""What a test says where a part of the system is missing."""

import os
from typing import NoReturn

import pytest


def lacking(reason: object) -> NoReturn:
    """On a user's machine the test is skipped; in CI it fails."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(reason))
