"""The table of codes: those that the API promises, each of them used, and none that is not in the table."""

import ast
import re
from collections import Counter

import pytest

from gateway.api.mcp import hints as mcp
from gateway.cli import hints as cli
from gateway.errors import CODES, GatewayError, HintWords, placeholders_blank
from tests.support import generate_error_docs
from tests.support.gateway_process import ROOT

# As the outward surface names them, with their HTTP status.
PROMISED = {
    "invalid_request": 400, "invalid_session_id": 400, "invalid_window_name": 400, "unknown_parameter": 400,
    "window_system_conflict": 400, "unauthorized": 401, "forbidden": 403, "session_not_found": 404,
    "window_not_found": 404, "window_already_exists": 409, "session_already_exists": 409, "session_busy": 409,
    "model_mismatch": 409, "window_corrupted": 422, "payload_too_large": 413, "rate_limited": 429,
    "engine_unreachable": 502, "engine_timeout": 504, "cache_unavailable": 503, "storage_full": 507, "internal": 500,
}  # fmt: skip
ADDED = {
    "not_found": 404, "response_not_found": 404, "previous_response_not_found": 404, "method_not_allowed": 405,
    "request_timeout": 408, "too_complex": 413, "store_unavailable": 503,
}  # fmt: skip
RETRYABLE = {
    "session_busy", "rate_limited", "request_timeout", "engine_unreachable", "engine_timeout", "cache_unavailable",
    "store_unavailable",
}  # fmt: skip
# Documented for operations and limits that do not exist yet.
NOT_YET: set[str] = set()


def used() -> Counter[str]:
    """Every string in the gateway's code, docstrings aside, but for the table itself."""
    return Counter(
        node.value
        for path in (ROOT / "gateway").rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_the_codes_are_those_promised_and_the_few_that_http_needs() -> None:
    assert {name: code.status for name, code in CODES.items()} == PROMISED | ADDED
    assert {name for name, code in CODES.items() if code.retryable} == RETRYABLE


def test_the_page_of_errors_is_as_the_code_is() -> None:
    assert generate_error_docs.PAGE.read_text() == generate_error_docs.page(), "run `make docs`"
    assert all(code.means[0].isupper() and code.remedy for code in CODES.values())


def test_every_code_is_used_but_those_of_what_is_not_there_yet() -> None:
    seen = used()
    assert {name for name in CODES if not seen[name]} == NOT_YET


def test_every_error_that_is_raised_has_a_code_of_the_table() -> None:
    raised = {
        node.args[0].value
        for path in (ROOT / "gateway").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "GatewayError"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(raised) > 10
    assert raised <= set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_an_error_carries_its_code_status_and_whether_to_try_again(code: str) -> None:
    error = GatewayError(code, "what", hint="how", details={"a": 1})
    assert (error.status, error.retryable) == (CODES[code].status, CODES[code].retryable)
    assert (str(error), error.message, error.hint, error.details) == ("what", "what", "how", {"a": 1})


def test_two_errors_share_no_details() -> None:
    shared = {"a": 1}
    one, other = GatewayError("internal", "x", details=shared), GatewayError("internal", "x")
    one.details["b"] = 2
    assert (shared, other.details) == ({"a": 1}, {})


def literals() -> str:
    """Every string in the gateway's code, f-strings included, as one text."""
    return "\n".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py") if path.name != "hints.py")


@pytest.mark.parametrize(
    ("words", "code", "hint", "expected"),
    [
        (cli.WORDS, "window_not_found", "`GET /admin/windows` lists them", "`cwg list` lists them"),
        (mcp.WORDS, "window_not_found", "`GET /admin/windows` lists them", "`window_list` lists them"),
        (cli.WORDS, "session_not_found", "`GET /admin/sessions` lists them", "`cwg sessions` lists them"),
        (mcp.WORDS, "session_not_found", "`GET /admin/sessions` lists them", "`session_list` lists them"),
        (cli.WORDS, "x", "see `GET /admin/windows/{name}/messages`", "see `cwg messages NAME`"),
        (
            mcp.WORDS,
            "x",
            "see `GET /admin/windows/{name}/messages`",
            "see the resource `cwg://windows/{name}/messages`",
        ),
        (mcp.WORDS, "x", "extend it (`PATCH /admin/windows/{name}`)", "extend it (`window_describe`)"),
        (cli.WORDS, "x", "choose another `new_session_id`", "choose another --session"),
        (cli.WORDS, "x", "did you mean 'ttl_seconds'?", "did you mean 'ttl_seconds'?"),
        (cli.WORDS, "unauthorized", "send `x-api-key: KEY`", "set CWG_API_KEY to the gateway's key"),
        (mcp.WORDS, "x", "start it with `cwg up`", "start it with `cwg up`"),
    ],
)
def test_a_hint_uses_the_terms_of_its_api(words: HintWords, code: str, hint: str, expected: str) -> None:
    assert words.translate(code, hint) == expected


def test_the_cli_has_words_only_for_what_hints_name() -> None:
    named = set(re.findall(r"`([^`\n]+)`", literals()))
    assert set(cli.WORDS.names) <= {placeholders_blank(name) for name in named}


def test_mcp_has_a_word_for_every_route_that_a_hint_may_name() -> None:
    routes = {placeholders_blank(name) for name in re.findall(r"`([A-Z]+ /admin[^`\n]*)`", literals())}
    assert routes
    assert routes <= set(mcp.WORDS.names)
