"""A short run of the fuzzer; `make fuzz` is the long one."""

from pathlib import Path

from loadtests.fuzz import fuzz
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import gateway_in_front_of


def test_generated_requests_are_answered_as_documented(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, busy_wait_s=0.5) as gateway:
        result = fuzz(gateway.url, MODEL, 400, per_round=15, cache=False)
        assert result.failures == {}
        assert result.requests >= 400
        assert len({answer.rsplit(" ", 1)[0] for answer in result.answers}) > 20  # operations
        assert " ERROR " not in gateway.log
