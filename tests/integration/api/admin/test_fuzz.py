"""A short run of the fuzzer; `make fuzz` is the long one."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, find, settings
from schemathesis.core.failures import FailureGroup

from gateway.api.admin import openapi, routes
from loadtests.fuzz import CHECKS, CONFIG, fuzz
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import gateway_in_front_of


def test_generated_requests_are_answered_as_documented(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, busy_wait_s=0.5) as gateway:
        result = fuzz(gateway.url, MODEL, 400, per_round=15, cache=False)
        assert result.failures == {}
        assert result.requests >= 400
        assert len({answer.rsplit(" ", 1)[0] for answer in result.answers}) > 20  # operations
        assert " ERROR " not in gateway.log


def test_413_counts_as_a_refusal() -> None:
    """A query of too many parameters is `too_complex`, whatever else is wrong with it."""
    schema = schemathesis.openapi.from_dict(openapi.document(routes.OPERATIONS), config=CONFIG)
    cases = schema["/admin/windows"]["GET"].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    once = settings(phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck))
    invalid = find(cases, lambda case: _is_failure(case, 200), settings=once)
    assert not _is_failure(invalid, 413)


def _is_failure(case: Any, status: int) -> bool:
    """Whether such an answer to a generated request is a failure."""
    request = httpx.Request("GET", "http://127.0.0.1/admin/windows", params=case.query)
    answer = httpx.Response(status, json={}, request=request)
    answer.elapsed = timedelta()
    try:
        case.validate_response(answer, checks=[check for check in CHECKS if "negative" in check.__name__])
    except FailureGroup:
        return True
    return False
