"""A line that is another one in every request, with the normaliser and without, by the engine's own count."""

from pathlib import Path
from typing import Any

import pytest

from tests.stack.conftest import Stack
from tests.stack.drive import Gateway, chat

pytestmark = pytest.mark.stack

LINE = "x-anthropic-billing-header: cc_version=2.1.117.{0}; cc_entrypoint=cli; cch={0}0;\n"


def asked(gateway: Gateway, session: str, nonce: str) -> dict[str, Any]:
    """Ask the same of an agent's prompt under another line; return the turn."""
    system = {"role": "system", "content": LINE.format(nonce) + "You are an agent of few words. " * 40}
    chat(gateway.client(session), [system, {"role": "user", "content": "hi"}], max_tokens=2)
    return dict(gateway.http.get(f"/admin/sessions/{session}").json()["turns"][0])


def test_the_prompt_behind_a_volatile_line_is_found_again(stack: Stack, shared: Gateway, tmp_path: Path) -> None:
    first, second = (asked(shared, "normalised", nonce) for nonce in ("48f", "71c"))
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert (second["miss"], second["cached_tokens"] >= second["expected_cached_tokens"] > 0) == ("none", True)
    without = Gateway(stack.settings(tmp_path / "data", CWG_NORMALISE=""), tmp_path / "gateway.log").start()
    try:
        first, second = (asked(without, "as-sent", nonce) for nonce in ("48f", "71c"))
    finally:
        without.close()
    assert first["prompt_tokens"] > shared.http.get("/admin/sessions/normalised").json()["turns"][0]["prompt_tokens"]
    assert second["cached_tokens"] < 64 < second["expected_cached_tokens"]
    assert second["miss"].startswith("message-changed: message 0 (system): differs (content, from character 44 on)")
