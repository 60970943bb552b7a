"""Valid and invalid requests generated from the OpenAPI document, and checks of every response.

`python -m loadtests.fuzz` starts a gateway in front of the canned engine, with `--stack` in front of the real one.
Exits with 1 if a response was a 5xx or did not conform to the document (status, content type, body), or if a request
was accepted that the document forbids. Half of the valid requests name existing windows and sessions.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks as conform

from loadtests import soak

# To the document, a window file is plain bytes.
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")

CHECKS = (
    not_a_server_error,
    conform.status_code_conformance,
    conform.content_type_conformance,
    conform.response_schema_conformance,
    conform.negative_data_rejection,  # what the document forbids is refused, including unknown parameters
)
# Any error refuses invalid data (schemathesis does not count 413, which is `too_complex`); whether it is one of the
# documented ones is for `status_code_conformance`.
CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": ["4xx", "5xx"]}}})
_ROUND = 60  # requests per operation and round
_TIMEOUT_S = 600  # a reply of 4,096 tokens takes more than two minutes on a CPU
_NAMES = 4  # windows and sessions created for each round
# Without a cache these answer 503, as they should.
NEED_CACHE = ("/admin/windows/{name}/prefetch", "/admin/windows/{name}/evict")


@dataclass
class FuzzResult:
    """The number of responses by operation and status, and the failures."""

    answers: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)  # an example of each kind

    @property
    def requests(self) -> int:
        """The number of requests sent."""
        return self.answers.total()


def fuzz(
    url: str, model: str, requests: int, *, cache: bool, per_round: int = _ROUND, first_seed: int = 0
) -> FuzzResult:
    """Send about `requests` requests, `per_round` for one operation at a time; `cache`: whether LMCache is there."""
    schema = schemathesis.openapi.from_url(f"{url}/admin/openapi.json", config=CONFIG)
    operations = [result.ok() for result in schema.get_all_operations()]
    result = FuzzResult()
    number = first_seed
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as http:
        while result.requests < requests:
            for operation in operations:
                if result.requests < requests and (cache or operation.path not in NEED_CACHE):
                    _fuzz_operation(operation, result, _create_windows(http, model, number), per_round, number)
            number += 1
    return result


def _fuzz_operation(operation: Any, result: FuzzResult, names: Sequence[str], examples: int, number: int) -> None:
    existing = st.one_of(st.none(), st.sampled_from(names))
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @seed(number)
    @settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases, name=existing)
    def send(case: Any, name: str | None) -> None:
        _insert_name(case, name)
        response = case.call(timeout=_TIMEOUT_S)
        route = f"{operation.method.upper()} {operation.path}"
        result.answers[f"{route} {response.status_code}"] += 1
        try:
            case.validate_response(response, checks=list(CHECKS))
        except FailureGroup as failures:
            for failure in failures.exceptions:
                example = f"{failure.message}\n{case.as_curl_command()}\n{response.text[:500]}"
                result.failures.setdefault(f"{route}: {failure.title}", example)

    send()


def _insert_name(case: Any, name: str | None) -> None:
    """Put the name of an existing window or session into an otherwise valid request."""
    if name is None or case.meta.generation.mode is schemathesis.GenerationMode.NEGATIVE:
        return
    for parameter in ("name", "session_id"):
        if case.path_parameters and parameter in case.path_parameters:
            case.path_parameters[parameter] = name
        elif isinstance(case.body, dict) and parameter in case.body:
            case.body[parameter] = name


def _create_windows(http: httpx.Client, model: str, number: int) -> list[str]:
    """Create sessions, and windows of the same names; return the names."""
    names = [f"fuzz-{number}-{i}" for i in range(_NAMES)]
    for name in names:
        if http.get(f"/admin/windows/{name}").status_code == 404:
            body = {"model": model, "messages": [{"role": "user", "content": f"hello {name}"}], "max_tokens": 4}
            http.post("/v1/chat/completions", json=body, headers={"x-session-id": name}).raise_for_status()
            http.post("/admin/windows", json={"session_id": name, "window_name": name}).raise_for_status()
    return names


def main() -> int:
    """Fuzz, print the result and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", action="store_true", help="in front of vLLM and LMCache")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cwg-fuzz-") as work:
        running = soak.stack(Path(work), "") if options.stack else soak.canned(Path(work))
        model = "demo" if options.stack else "canned"
        with running as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            result = fuzz(url, model, options.requests, cache=options.stack, first_seed=options.seed)
            errors = soak.logged_errors(Path(work) / "gateway.log")
    for answer, count in sorted(result.answers.items()):
        print(f"{count:6} {answer}")
    for failure in (*(f"{kind}\n{example}" for kind, example in result.failures.items()), *errors):
        print(f"\n{failure}", file=sys.stderr)
    print(f"{result.requests} requests, {len(result.failures)} kinds of failures, {len(errors)} errors in the log")
    return 1 if result.failures or errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
