"""Windows that come by themselves, with their KV: left alone, past a threshold, and at SIGTERM."""

from pathlib import Path
from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, converse
from tests.support.gateway_process import eventually

pytestmark = pytest.mark.stack

_OFF = {
    "CWG_AUTO_FREEZE": "true",
    "CWG_AUTO_FREEZE_IDLE_MINUTES": "0",
    "CWG_AUTO_FREEZE_SHARE": "0",
    "CWG_AUTO_FREEZE_EVERY_S": "0.5",
}


def _windows(gateway: Gateway, session: str) -> list[dict[str, Any]]:
    return list(gateway.http.get("/admin/windows", params={"session_id": session, "tags": "auto"}).json()["windows"])


def _one_whole_window(gateway: Gateway, session: str, why: str) -> None:
    eventually(lambda: bool(_windows(gateway, session)), f"a window of {session}", 30)
    (line,) = _windows(gateway, session)
    window = gateway.http.get(f"/admin/windows/{line['name']}").json()
    assert why in line["description"]
    thawed = gateway.thaw(line["name"], warm="gpu")
    assert thawed["receipt"]["chunks_expected"] == thawed["receipt"]["chunks_found"] > 0
    assert thawed["receipt"]["cached_tokens"] > 0
    assert window["token_count"] == thawed["token_count"]


def test_w05_i4_idle_threshold_and_sigterm_each_leave_one_window_with_its_kv(stack: Stack, tmp_path: Path) -> None:
    gateway = Gateway(stack.settings(tmp_path / "data", **_OFF), tmp_path / "gateway.log").start()
    try:
        # A user would say 30 minutes and 100,000 tokens; here it is about a second, and what the demo says in one.
        mcp(gateway, "auto_freeze_config", policy={"enabled": True, "idle_timeout_minutes": 0.02})
        converse(gateway.client("left-alone"), "left alone", turns=2)
        _one_whole_window(gateway, "left-alone", "idle for")
        mcp(gateway, "auto_freeze_config", policy={"idle_timeout_minutes": None, "token_threshold": 400})
        converse(gateway.client("long"), "a long conversation", turns=4)
        _one_whole_window(gateway, "long", "(threshold 400)")
        mcp(gateway, "auto_freeze_config", policy={"token_threshold": None, "at_shutdown": True})
        converse(gateway.client("stopped"), "stopped", turns=2)
        gateway.stop()
        gateway.start()
        assert mcp(gateway, "auto_freeze_config")["policy"]["at_shutdown"], "kept over the restart"
        _one_whole_window(gateway, "stopped", "the gateway was stopped")
    finally:
        gateway.close()
