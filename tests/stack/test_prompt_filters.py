"""A line that is another one in every request, with the normaliser and without, by the engine's own count."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat

pytestmark = pytest.mark.stack

# vLLM 0.32 takes the first of them out of system messages itself, but not of a developer's.
BILLING = "x-anthropic-billing-header: cc_version=2.1.117.{0}; cc_entrypoint=cli; cch={0}0;\n"
STAMPED = "Request ID: 0af7651916cd43dd8448eb211c8031{0}\n[2026-03-09T18:00:{0}Z]\n"


@pytest.fixture
def off(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway without the normaliser."""
    gateway = Gateway(stack.settings(tmp_path / "data", CWG_NORMALISE=""), tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()


def asked(gateway: Gateway, role: str, line: str) -> list[dict[str, Any]]:
    """Ask the same twice of an agent's prompt, each time under another line; return both turns."""
    session = f"normalised-{role}"
    for nonce in ("31", "47"):
        prompt = {"role": role, "content": line.format(nonce) + "You are an agent of few words. " * 40}
        chat(gateway.client(session), [prompt, {"role": "user", "content": "hi"}], max_tokens=2)
    turns: list[dict[str, Any]] = gateway.http.get(f"/admin/sessions/{session}").json()["turns"]
    return turns[::-1]


@pytest.mark.parametrize(("role", "line"), [("developer", BILLING), ("system", STAMPED)])
def test_the_prompt_behind_a_volatile_line_is_found_again(shared: Gateway, off: Gateway, role: str, line: str) -> None:
    first, second = asked(shared, role, line)
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["miss"] == "none"
    assert second["cached_tokens"] >= second["expected_cached_tokens"] > 6 * 64
    as_sent, missed = asked(off, role, line)
    assert as_sent["prompt_tokens"] > first["prompt_tokens"] + 20
    assert missed["cached_tokens"] < 64 < missed["expected_cached_tokens"]
    assert missed["miss"].startswith(f"message-changed: message 0 ({role}): differs (content, from character ")
