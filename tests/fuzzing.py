"""Every operation of a served OpenAPI document, tried with what it allows and with what it does not."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

ALL: Any = list(HealthCheck)
CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def fuzz(url: str, *, examples: int, least: int) -> None:
    """Raises at the first answer that is a 5xx, or not as the document says. At least `least` operations are tried."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore
    operations = [each for each in operations if not each.path.startswith("/admin")]
    for operation in operations:
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:
            run(operation, mode, examples)
    assert len(operations) >= least


def run(operation: Any, mode: schemathesis.GenerationMode, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=ALL)
    @given(operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    each()
