"""Requests that the OpenAPI document makes up, right and wrong ones, and a look at every answer.

`python -m loadtests.fuzz` starts a gateway before the canned engine, with `--stack` before the real one.
It ends with 1 where an answer was a 5xx, or was not as the document says (its status, its type, its body), or where a
request was taken that the document forbids. Of the names in right ones half are such as there are.
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

# A window's file is bytes, as far as the document goes.
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")

CHECKS = (
    not_a_server_error,
    conform.status_code_conformance,
    conform.content_type_conformance,
    conform.response_schema_conformance,
    conform.negative_data_rejection,  # what the document forbids is refused, unknown parameters among it
)
_ROUND = 60  # requests of an operation, before the next has its turn
_PATIENT_S = 600  # an answer of 4,096 tokens takes a CPU two minutes and more
_THINGS = 4  # windows and sessions made anew for each round
# Where there is no cache, these say so with an honest 503.
NEED_CACHE = ("/admin/windows/{name}/prefetch", "/admin/windows/{name}/evict")


@dataclass
class Found:
    """What the answers were: how many of each operation and status, and what was wrong with them."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, str] = field(default_factory=dict)  # an example of each kind

    @property
    def requests(self) -> int:
        """How many were sent."""
        return self.answers.total()


def fuzz(url: str, model: str, requests: int, *, cache: bool, each: int = _ROUND, first_seed: int = 0) -> Found:
    """Send about so many requests, `each` of an operation before the next has its turn; `cache`: there is one."""
    schema = schemathesis.openapi.from_url(f"{url}/admin/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    found = Found()
    number = first_seed
    with httpx.Client(base_url=url, timeout=_PATIENT_S) as http:
        while found.requests < requests:
            for operation in operations:
                if found.requests < requests and (cache or operation.path not in NEED_CACHE):
                    _operation(operation, found, _things(http, model, number), each, number)
            number += 1
    return found


def _operation(operation: Any, found: Found, names: Sequence[str], examples: int, number: int) -> None:
    one = st.one_of(st.none(), st.sampled_from(names))
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @seed(number)
    @settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases, name=one)
    def ask(case: Any, name: str | None) -> None:
        _name(case, name)
        response = case.call(timeout=_PATIENT_S)
        asked = f"{operation.method.upper()} {operation.path}"
        found.answers[f"{asked} {response.status_code}"] += 1
        try:
            case.validate_response(response, checks=list(CHECKS))
        except FailureGroup as failures:
            for failure in failures.exceptions:
                example = f"{failure.message}\n{case.as_curl_command()}\n{response.text[:500]}"
                found.wrong.setdefault(f"{asked}: {failure.title}", example)

    ask()


def _name(case: Any, name: str | None) -> None:
    """Put the name of something that there is where the document has a place for one, if nothing else is wrong."""
    if name is None or case.meta.generation.mode is schemathesis.GenerationMode.NEGATIVE:
        return
    for place in ("name", "session_id"):
        if case.path_parameters and place in case.path_parameters:
            case.path_parameters[place] = name
        elif isinstance(case.body, dict) and place in case.body:
            case.body[place] = name


def _things(http: httpx.Client, model: str, number: int) -> list[str]:
    """Make sessions, and windows of the same names; return the names."""
    names = [f"fuzz-{number}-{i}" for i in range(_THINGS)]
    for name in names:
        if http.get(f"/admin/windows/{name}").status_code == 404:
            body = {"model": model, "messages": [{"role": "user", "content": f"hello {name}"}], "max_tokens": 4}
            http.post("/v1/chat/completions", json=body, headers={"x-session-id": name}).raise_for_status()
            http.post("/admin/windows", json={"session_id": name, "window_name": name}).raise_for_status()
    return names


def main() -> int:
    """Fuzz, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", action="store_true", help="before vLLM and LMCache")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cwg-fuzz-") as work:
        opened = soak.stack(Path(work), "") if options.stack else soak.canned(Path(work))
        model = "demo" if options.stack else "canned"
        with opened as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            found = fuzz(url, model, options.requests, cache=options.stack, first_seed=options.seed)
            complaints = soak.complaints(Path(work) / "gateway.log")
    for answer, count in sorted(found.answers.items()):
        print(f"{count:6} {answer}")
    for what in (*(f"{kind}\n{example}" for kind, example in found.wrong.items()), *complaints):
        print(f"\n{what}", file=sys.stderr)
    print(f"{found.requests} requests, {len(found.wrong)} kinds of wrong answers, {len(complaints)} errors in the log")
    return 1 if found.wrong or complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
