"""Windows that come by themselves, with their KV: left alone, past a threshold, and at SIGTERM."""

from pathlib import Path
from typing import Any

import pytest

from tests.running import eventually
from tests.stack.conftest import Stack
from tests.stack.drive import Gateway, converse

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


def test_w5_idle_threshold_and_sigterm_each_leave_one_window_with_its_kv(stack: Stack, tmp_path: Path) -> None:
    gateway = Gateway(stack.settings(tmp_path / "data", **_OFF), tmp_path / "gateway.log").start()
    try:
        assert gateway.http.put("/admin/policies", json={"idle_timeout_minutes": 0.02}).status_code == 200
        converse(gateway.client("left-alone"), "left alone", turns=2)
        _one_whole_window(gateway, "left-alone", "idle for")
        rules = {"idle_timeout_minutes": None, "token_threshold": 400}
        assert gateway.http.put("/admin/policies", json=rules).status_code == 200
        converse(gateway.client("long"), "a long conversation", turns=4)
        _one_whole_window(gateway, "long", "(threshold 400)")
        rules = {"token_threshold": None, "at_shutdown": True}
        assert gateway.http.put("/admin/policies", json=rules).status_code == 200
        converse(gateway.client("stopped"), "stopped", turns=2)
        gateway.stop()
        gateway.start()
        _one_whole_window(gateway, "stopped", "the gateway was stopped")
    finally:
        gateway.close()
