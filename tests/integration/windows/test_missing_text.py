"""A window that an older version left without its text is reported everywhere, and can be deleted."""

from pathlib import Path

import pytest

from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.tier_harness import lose_text

pytestmark = pytest.mark.sqlite

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "and?"}]}


@pytest.fixture
def damaged(engine: FakeEngine, tmp_path: Path) -> Gateway:
    """A gateway that starts with such a window, and with one that is whole."""
    with gateway_in_front_of(engine.url, tmp_path) as before:
        for name in ("whole", "lost"):
            assert before.chat(name, f"hi from {name}").status_code == 200
            assert before.freeze(name, name).status_code == 201
        before.stop()
    lose_text(before.data_dir / "gateway.db", "lost")
    return Gateway(tmp_path, engine.url)


def test_window_without_text_is_reported_and_deletable(damaged: Gateway) -> None:
    try:
        damaged.start().wait()
        windows = "/admin/windows"
        assert "1 windows have lost their text to an older version: lost;" in damaged.log
        store = damaged.http.get("/admin/health?component=store").json()["components"]["store"]
        assert (store["status"], "lost" in store["message"]) == ("degraded", True)
        check = next(c for c in damaged.http.post("/admin/doctor").json()["checks"] if c["name"] == "windows")
        assert (check["status"], "import an export" in check["remedy"]) == ("warning", True)
        for path, body in (
            ("thaw", {}), ("clone", {"target_window": "copy"}), ("clone", {"target_window": "copy", "isolate": True}),
            ("fanout", {"count": 2}), ("ask", {"question": "and?"}), ("thaw", {"continuation_prompt": "and?"}),
        ):  # fmt: skip
            answer = damaged.http.post(f"{windows}/lost/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "window_corrupted"), path
        for path in ("messages", "export"):
            answer = damaged.http.get(f"{windows}/lost/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "window_corrupted"), path
        assert damaged.http.post("/w/lost/v1/chat/completions", json=ASKED).status_code == 422
        verdict = damaged.http.post(f"{windows}/lost/verify").json()
        assert (verdict["ok"], "text of window 'lost' is gone" in verdict["warnings"][0]) == (False, True)
        (warning,) = damaged.http.post(f"{windows}/whole/verify").json()["warnings"]
        assert "holds no KV to verify" in warning
        assert damaged.http.delete(f"{windows}/lost").status_code == 200
        assert damaged.http.get("/admin/health?component=store").json()["components"]["store"]["status"] == "healthy"
    finally:
        damaged.close()
